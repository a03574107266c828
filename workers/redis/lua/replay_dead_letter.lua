-- Move a dead letter's image back to the images stream, unless the backlog is full. Prelude: _capacity.lua.
-- KEYS: images, counters, the cached size, dead, and where the producer gave an id: the key that remembers it.
-- ARGV: most images, most bytes, seconds to remember the id, the letter's id.
-- Returns {new entry id}, or the refusal {'', 'images' or 'bytes', how many there are}, or {'', 'gone'},
-- or {'', 'foreign'} where the entry is no dead letter.

local images, counters, cache, dead, seen = KEYS[1], KEYS[2], KEYS[3], KEYS[4], KEYS[5]
local letter_id = ARGV[4]

local letter = redis.call('XRANGE', dead, letter_id, letter_id)[1]
if not letter then
    return {'', 'gone'}
end

local NOT_SEEN = false
local ours = {
    ['dead.reason'] = NOT_SEEN,
    ['dead.detail'] = NOT_SEEN,
    ['dead.deliveries'] = NOT_SEEN,
    ['dead.failed_at'] = NOT_SEEN,
    ['dead.entry_id'] = NOT_SEEN,
}
local fields, has_id = {}, false
for i = 1, #letter[2], 2 do
    local name, value = letter[2][i], letter[2][i + 1]
    if ours[name] ~= nil then
        ours[name] = value
    elseif name ~= 'id' or value ~= '' then
        has_id = has_id or name == 'id'
        fields[#fields + 1] = name
        fields[#fields + 1] = value
    end
end
for _, value in pairs(ours) do
    if value == NOT_SEEN then
        return {'', 'foreign'}
    end
end
if not string.match(ours['dead.entry_id'], '^%d+%-%d+$') then
    return {'', 'foreign'}
end
if not has_id then
    -- Without an id of its producer's, an image is known by its original entry id.
    fields[#fields + 1] = 'id'
    fields[#fields + 1] = ours['dead.entry_id']
end

local refused = refusal(images, counters, cache, ARGV[1], ARGV[2])
if refused then
    return refused
end

local id = add(images, cache, fields)
if seen then
    -- The key still names the entry that failed: a repeated push must be answered with the new one.
    local before = redis.call('SET', seen, id, 'EX', ARGV[3], 'GET')
    local digest = before and string.match(before, '^%S+ (%S+)')
    if digest then
        redis.call('SET', seen, id .. ' ' .. digest, 'EX', ARGV[3])
    end
end
redis.call('XDEL', dead, letter_id)
return {id}
