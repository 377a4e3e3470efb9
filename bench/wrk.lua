-- Sends what a Go Micro client sends, checks each reply, and prints what it measured as JSON.
wrk.method = "POST"
wrk.body = '{"name":"Alice"}\n'
wrk.headers["User-Agent"] = "Go-http-client/1.1"
wrk.headers["Accept"] = "application/json"
wrk.headers["Content-Type"] = "application/json"
wrk.headers["Micro-Endpoint"] = "Helloworld.Call"
wrk.headers["Micro-Id"] = "0"
wrk.headers["Micro-Method"] = "Helloworld.Call"
wrk.headers["Micro-Service"] = "bench"
wrk.headers["Timeout"] = "5000000000"

local threads = {}

function setup(thread)
   table.insert(threads, thread)
end

function init()
   wrong = 0
end

function response(status, headers, body)
   if not body:find('^{"message":"Hello Alice"}\n?$') then
      wrong = wrong + 1
   end
end

function done(summary, latency)
   local failed = 0
   for _, count in pairs(summary.errors) do
      failed = failed + count
   end
   for _, thread in ipairs(threads) do
      failed = failed + thread:get("wrong")
   end
   io.write(string.format(
      'JSON {"calls":%d,"seconds":%f,"failed":%d,"p50_us":%d,"p99_us":%d}\n',
      summary.requests, summary.duration / 1e6, failed,
      latency:percentile(50), latency:percentile(99)))
end
