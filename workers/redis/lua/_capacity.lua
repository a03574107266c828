#!lua
-- Whether there is room for one more image: the part that push and replay share, put before each of them.
-- No allow-oom flag: a server at its memory limit refuses before anything is written.

-- Up to so many entries are measured anew each time, in some 0.1 ms; more of them now and then.
local MEASURED_AT_ONCE = 1000

-- How many bytes the stream takes, whoever wrote it. SAMPLES 0 looks at every node of the stream: a sample is of the
-- oldest alone, and wrong by any factor where images are of several sizes. What was measured is good for 1 ms for each
-- 100 entries, so that measuring takes about one hundredth of the server's time, however long the stream.
local function bytes_of(images, length, measured)
    local known = length > MEASURED_AT_ONCE and redis.call('GET', measured)
    if known then
        return tonumber(known)
    end
    local bytes = redis.call('MEMORY', 'USAGE', images, 'SAMPLES', 0) or 0
    if length > MEASURED_AT_ONCE then
        redis.call('SET', measured, bytes, 'PX', math.ceil(length / 100))
    end
    return bytes
end

-- Says which bound is reached, by what, and counts the refusal; nothing where there is room.
local function refusal(images, counters, measured, max_images, max_bytes)
    local length = redis.call('XLEN', images)
    if length >= tonumber(max_images) then
        redis.call('HINCRBY', counters, 'refused_images', 1)
        return {'', 'images', length}
    end
    local bytes = bytes_of(images, length, measured)
    if bytes >= tonumber(max_bytes) then
        redis.call('HINCRBY', counters, 'refused_bytes', 1)
        return {'', 'bytes', bytes}
    end
end

-- Adds an image; what was measured and is still good grows by it.
local function add(images, measured, fields)
    local known = redis.call('GET', measured)
    if known then
        local size = 0
        for _, value in ipairs(fields) do
            size = size + #value
        end
        redis.call('SET', measured, string.format('%.0f', tonumber(known) + size), 'XX', 'KEEPTTL')
    end
    return redis.call('XADD', images, '*', unpack(fields))
end

