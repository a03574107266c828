#!lua flags=allow-oom
-- Take or renew a worker's lease on its consumer name, unless another worker has it.
-- KEYS: lease.  ARGV: the worker, ms that every lease lasts, ms that this one lasts from now (1 ends it).
-- Returns the worker that has it.

local lease, worker, lease_ms, left_ms = KEYS[1], ARGV[1], ARGV[2], ARGV[3]

local holder = redis.call('GET', lease)
-- More is left than any lease lasts: the server's clock was set back. One that is alive renews it.
if holder and holder ~= worker and redis.call('PTTL', lease) <= tonumber(lease_ms) then
    return holder
end
redis.call('SET', lease, worker, 'PX', left_ms)
return worker
