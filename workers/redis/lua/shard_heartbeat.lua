#!lua flags=allow-oom
-- Count a worker's heartbeat, and delete the counters of dead workers, unless one has moved: that worker lives.
-- KEYS: workers.  ARGV: the worker, then for each dead worker its name and its counter.
-- Returns {worker, counter, ...} of all workers.

local workers = KEYS[1]

for i = 2, #ARGV, 2 do
    if redis.call('HGET', workers, ARGV[i]) == ARGV[i + 1] then
        redis.call('HDEL', workers, ARGV[i])
    end
end
redis.call('HINCRBY', workers, ARGV[1], 1)
return redis.call('HGETALL', workers)
