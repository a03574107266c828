#!lua flags=allow-oom
-- Which consumer owns an entry: the prelude that publish, heartbeat and release share, put before each of them.
-- The flag lets workers drain a server at its memory limit: they write less than they delete.

-- How often an entry was delivered; nil where it is not pending for the consumer.
local function deliveries_to(images, group, consumer, id)
    local pending = redis.pcall('XPENDING', images, group, id, id, 1)
    if pending['err'] then
        -- A server that was emptied has no group: nobody owns the entry any more.
        if string.sub(pending['err'], 1, 7) ~= 'NOGROUP' then
            error(pending)
        end
        return nil
    end
    return pending[1] and pending[1][2] == consumer and pending[1][4] or nil
end

