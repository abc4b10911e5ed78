-- Restore a group of generations that Redis has lost.
--
-- KEYS[1]  the group, a hash
-- ARGV     milliseconds that it lives; then each field and its value
-- Returns  1 if the group had no main token, else 0
--
-- Existing fields are newer: an invalidation also writes a missing group.
local key = KEYS[1]
if redis.call('HGET', key, '*') then return 0 end
local shapes = redis.call('HGET', key, '?') or ''
for i = 2, #ARGV, 2 do
  if ARGV[i] ~= '?' then
    redis.call('HSETNX', key, ARGV[i], ARGV[i + 1])
  else
    for shape in ARGV[i + 1]:gmatch('[^|]+') do
      if not ('|' .. shapes .. '|'):find('|' .. shape .. '|', 1, true) then
        shapes = shapes == '' and shape or shapes .. '|' .. shape
      end
    end
  end
end
if shapes ~= '' then redis.call('HSET', key, '?', shapes) end
redis.call('PEXPIRE', key, ARGV[1])
return 1
