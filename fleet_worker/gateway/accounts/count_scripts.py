"""The scripts with which Redis or Valkey counts what keys have used, in Lua (`counts` says how, in Python).

KEYS[1] is a hash with three numbers for each limit: its window, the amount in it, and that of the window before; and
with what each gateway says that it has used of a budget itself. KEYS[2] is a sorted set of the requests that run, by
the time at which each is taken for lost. All times are the broker's.
"""

from __future__ import annotations

from fleet_worker.gateway.accounts.counts import PERIODS

_WINDOWS = """
local time = redis.call('TIME')
local now = time[1] + time[2] / 1000000
local periods = {PERIODS}

-- The number of the month of a day since 1970: http://howardhinnant.github.io/date_algorithms.html
local function month_of(day)
    local z = day + 719468
    local era = math.floor(z / 146097)
    local doe = z - era * 146097
    local yoe = math.floor((doe - math.floor(doe / 1460) + math.floor(doe / 36524) - math.floor(doe / 146096)) / 365)
    local mp = math.floor((5 * (doe - (365 * yoe + math.floor(yoe / 4) - math.floor(yoe / 100))) + 2) / 153)
    local month = mp < 10 and mp + 3 or mp - 9
    return (yoe + era * 400 + (month <= 2 and 1 or 0)) * 12 + month - 1
end

local function is_budget(name) return name == 'day' or name == 'month' end

local function store(w)
    w.count, w.previous = math.max(0, w.count), math.max(0, w.previous)
    redis.call('HSET', KEYS[1], w.name, w.number, w.name .. ':count', w.count, w.name .. ':previous', w.previous)
    redis.call('EXPIRE', KEYS[1], is_budget(w.name) and 3456000 or 300)
end

local function window(name)
    local period = periods[name]
    local number = period > 0 and math.floor(now / period) or month_of(math.floor(now / 86400))
    local stored = redis.call('HMGET', KEYS[1], name, name .. ':count', name .. ':previous')
    local was, count, previous = tonumber(stored[1] or number), tonumber(stored[2] or 0), tonumber(stored[3] or 0)
    if number > was then
        previous = number == was + 1 and count or 0
        count = 0
    end
    local w = {name = name, number = number, count = count, previous = previous}
    if number < was then store(w) end
    return w
end

-- A gateway has used so much of a budget in the window with this number.
local function report(w, gateway, number, used)
    if tonumber(number) ~= w.number then return end
    local field = w.name .. ':of:' .. gateway
    local was, before = string.match(redis.call('HGET', KEYS[1], field) or '', '^(%d+):(%d+)$')
    if was ~= number then before = 0 end
    w.count = w.count + used - before
    redis.call('HSET', KEYS[1], field, number .. ':' .. used)
end
""".replace("PERIODS", ", ".join(f"{name} = {seconds}" for name, seconds in PERIODS.items()))

TAKE = f"""{_WINDOWS}
-- ARGV: gateway, lease, its seconds, most requests in parallel (0: any number);
-- then for each limit: name, most, charge, number of the window of a budget, what the gateway has used of it
redis.call('ZREMRANGEBYSCORE', KEYS[2], '-inf', now)
local running, refused, windows = redis.call('ZCARD', KEYS[2]), '', {{}}
if ARGV[4] ~= '0' and running >= tonumber(ARGV[4]) then refused = 'parallel' end
for i = 5, #ARGV, 5 do
    local w, most, charge = window(ARGV[i]), tonumber(ARGV[i + 1]), tonumber(ARGV[i + 2])
    local fits
    if is_budget(w.name) then
        report(w, ARGV[1], ARGV[i + 3], ARGV[i + 4])
        store(w)
        fits = w.count < most
    else
        fits = w.count + w.previous * (1 - now % 60 / 60) + charge <= most
    end
    if refused == '' and not fits then refused = w.name end
    windows[#windows + 1] = w
end
if refused == '' then
    for i, w in ipairs(windows) do
        local at = 5 * i
        if is_budget(w.name) then
            report(w, ARGV[1], ARGV[at + 3], string.format('%d', ARGV[at + 4] + ARGV[at + 2]))
        else
            w.count = w.count + ARGV[at + 2]
        end
        store(w)
    end
    if ARGV[2] ~= '' then
        redis.call('ZADD', KEYS[2], now + ARGV[3], ARGV[2])
        redis.call('EXPIRE', KEYS[2], 2 * ARGV[3])
        running = running + 1
    end
end
local answer = {{string.format('%.6f', now), refused, running}}
for _, w in ipairs(windows) do
    for _, each in ipairs({{w.number, w.count, w.previous}}) do answer[#answer + 1] = each end
end
return answer
"""

SETTLE = f"""{_WINDOWS}
-- ARGV: gateway, lease; then for each limit: name, what is to be added (less than 0: given back), number of the window,
-- what the gateway has used of a budget
if ARGV[2] ~= '' then redis.call('ZREM', KEYS[2], ARGV[2]) end
for i = 3, #ARGV, 4 do
    local w, charge, number = window(ARGV[i]), tonumber(ARGV[i + 1]), tonumber(ARGV[i + 2])
    if is_budget(w.name) then
        report(w, ARGV[1], ARGV[i + 2], ARGV[i + 3])
    elseif charge >= 0 or w.number == number then
        w.count = w.count + charge
    elseif w.number == number + 1 then
        w.previous = w.previous + charge
    end
    store(w)
end
"""

RENEW = """
-- ARGV: seconds, leases
local time = redis.call('TIME')
local ends = time[1] + time[2] / 1000000 + ARGV[1]
for i = 2, #ARGV do redis.call('ZADD', KEYS[2], ends, ARGV[i]) end
redis.call('EXPIRE', KEYS[2], 2 * ARGV[1])
"""
