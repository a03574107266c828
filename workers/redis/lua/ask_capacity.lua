-- Ask whether an image would be admitted, without sending it. Prelude: _capacity.lua.
-- KEYS: as for push_image.lua.  ARGV: most images, most bytes.
-- Returns {'room'}, or the refusal that push_image.lua would return.

if KEYS[4] and redis.call('GET', KEYS[4]) then
    return {'room'} -- a duplicate: a push would write nothing
end
return refusal(KEYS[1], KEYS[2], KEYS[3], ARGV[1], ARGV[2]) or {'room'}
