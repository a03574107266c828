-- Whether an image would be let in, asked without sending it. Behind room.lua.
-- KEYS: as for push.lua.  ARGV: most images, most bytes.
-- Returns {'room'}, or what push.lua would where it refuses.

if KEYS[4] and redis.call('GET', KEYS[4]) then
    return {'room'} -- it is there already: a push writes nothing
end
return refusal(KEYS[1], KEYS[2], KEYS[3], ARGV[1], ARGV[2]) or {'room'}
