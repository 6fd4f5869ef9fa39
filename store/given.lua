-- Writes rows of given features, each unless what is there is newer.
--
-- KEYS[i]  a row      ARGV[2i - 1]  its bytes: see features/given.py for where the two times stand
--                     ARGV[2i]      when it expires, ms since the epoch; 0 for never
--
-- Returns how many were written.
local written = 0
for i = 1, #KEYS do
  local row, there = ARGV[2 * i - 1], redis.call('GETRANGE', KEYS[i], 8, 23)
  local event, created = struct.unpack('<i8i8', row, 9)
  local newer = true
  if #there == 16 then
    local event_there, created_there = struct.unpack('<i8i8', there)
    newer = event > event_there or (event == event_there and created >= created_there)
  end
  if newer then
    if ARGV[2 * i] == '0' then
      redis.call('SET', KEYS[i], row)
    else
      redis.call('SET', KEYS[i], row, 'PXAT', ARGV[2 * i])
    end
    written = written + 1
  end
end
return written
