#!lua
-- Admission control: the prelude that push and replay share, put before each of them.
-- No allow-oom flag: a server at its memory limit refuses before anything is written.

-- The bytes of up to so many entries are measured at every call, in some 0.1 ms; of more, now and then.
local MEASURED_EACH_TIME = 1000

-- How many bytes the stream takes, whoever wrote it. SAMPLES 0 looks at every node of the stream: a sample looks at the
-- oldest only, and is wrong by any factor where images are of several sizes. A measurement is cached for 1 ms per 100
-- entries, so that measuring takes about one hundredth of the server's time, however long the stream.
local function bytes_of(images, length, cache)
    local cached = length > MEASURED_EACH_TIME and redis.call('GET', cache)
    if cached then
        return tonumber(cached)
    end
    local bytes = redis.call('MEMORY', 'USAGE', images, 'SAMPLES', 0) or 0
    if length > MEASURED_EACH_TIME then
        redis.call('SET', cache, bytes, 'PX', math.ceil(length / 100))
    end
    return bytes
end

-- Returns which bound is reached and the value that reached it, and counts the refusal; nil where there is capacity.
local function refusal(images, counters, cache, max_images, max_bytes)
    local length = redis.call('XLEN', images)
    if length >= tonumber(max_images) then
        redis.call('HINCRBY', counters, 'refused_images', 1)
        return {'', 'images', length}
    end
    local bytes = bytes_of(images, length, cache)
    if bytes >= tonumber(max_bytes) then
        redis.call('HINCRBY', counters, 'refused_bytes', 1)
        return {'', 'bytes', bytes}
    end
end

-- Adds an image, and its size to the cached measurement.
local function add(images, cache, fields)
    local cached = redis.call('GET', cache)
    if cached then
        local size = 0
        for _, value in ipairs(fields) do
            size = size + #value
        end
        redis.call('SET', cache, string.format('%.0f', tonumber(cached) + size), 'XX', 'KEEPTTL')
    end
    return redis.call('XADD', images, '*', unpack(fields))
end

