-- Whether an image would be let in, asked without sending it. Behind _capacity.lua.
-- KEYS: as for push_image.lua.  ARGV: most images, most bytes.
-- Returns {'room'}, or what push_image.lua would where it refuses.

if KEYS[4] and redis.call('GET', KEYS[4]) then
    return {'room'} -- it is there already: a push writes nothing
end
return refusal(KEYS[1], KEYS[2], KEYS[3], ARGV[1], ARGV[2]) or {'room'}
