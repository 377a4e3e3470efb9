// Go's side of the benchmarks: Go Micro on its http transport with JSON, Go Micro with its grpc
// plugins and protobuf, which is its fastest form, and net/http with encoding/json (a server only).
//
//	bench micro-http|micro-grpc|net-http serve PORT
//	bench micro-http|micro-grpc call JOB    prints what it measured, as bench/load.py does
package main

import (
	"context"
	"encoding/json"
	"fmt"
	"net/http"
	"os"
	"runtime"
	"runtime/debug"
	"slices"
	"strings"
	"sync"
	"time"

	grpcclient "github.com/go-micro/plugins/v4/client/grpc"
	grpcserver "github.com/go-micro/plugins/v4/server/grpc"
	"go-micro.dev/v4/broker"
	"go-micro.dev/v4/client"
	"go-micro.dev/v4/logger"
	"go-micro.dev/v4/registry"
	"go-micro.dev/v4/server"
	"golang.org/x/sys/unix"
	"google.golang.org/protobuf/types/known/wrapperspb"
)

const greeting = "Hello Alice"

type Request struct {
	Name string `json:"name"`
}

type Response struct {
	Message string `json:"message"`
}

// Helloworld is called with JSON.
type Helloworld struct{}

func (h *Helloworld) Call(ctx context.Context, req *Request, rsp *Response) error {
	rsp.Message = "Hello " + req.Name
	return nil
}

// Greeter is called with protobuf; a StringValue has the bytes of any message with one string.
type Greeter struct{}

func (g *Greeter) Call(ctx context.Context, req, rsp *wrapperspb.StringValue) error {
	rsp.Value = "Hello " + req.Value
	return nil
}

func serve(form, address string) error {
	newServer, handler := server.NewServer, any(new(Helloworld))
	switch form {
	case "net-http":
		return http.ListenAndServe(address, http.HandlerFunc(greet))
	case "micro-grpc":
		newServer, handler = grpcserver.NewServer, any(new(Greeter))
	}
	s := newServer(server.Name("bench"), server.Address(address),
		server.Registry(registry.NewMemoryRegistry()), server.Broker(broker.NewMemoryBroker()))
	if err := s.Handle(s.NewHandler(handler)); err != nil {
		return err
	}
	if err := s.Start(); err != nil {
		return err
	}
	select {}
}

func greet(w http.ResponseWriter, r *http.Request) {
	var request Request
	if err := json.NewDecoder(r.Body).Decode(&request); err != nil {
		http.Error(w, err.Error(), http.StatusBadRequest)
		return
	}
	w.Header().Set("Content-Type", "application/json")
	_ = json.NewEncoder(w).Encode(Response{Message: "Hello " + request.Name})
}

// What every client of the benchmarks is told: bench/load.py.
type Job struct {
	Port      int     `json:"port"`
	ServerPid int     `json:"server_pid"`
	Callers   int     `json:"callers"`
	WarmUp    float64 `json:"warm_up"`
	Seconds   float64 `json:"seconds"`
}

// Retries are off, so that a failure is seen and not repaired.
func newClient(form string, port int) (func() error, error) {
	known := registry.NewMemoryRegistry()
	node := &registry.Node{Id: "one", Address: fmt.Sprintf("127.0.0.1:%d", port),
		Metadata: map[string]string{"protocol": "mucp"}}
	if err := known.Register(&registry.Service{Name: "bench", Nodes: []*registry.Node{node}}); err != nil {
		return nil, err
	}
	options := []client.Option{client.Registry(known), client.Retries(0)}
	if form == "micro-grpc" {
		c := grpcclient.NewClient(options...)
		return func() error {
			var rsp wrapperspb.StringValue
			req := c.NewRequest("bench", "Greeter.Call", wrapperspb.String("Alice"))
			return check(c.Call(context.Background(), req, &rsp), rsp.Value)
		}, nil
	}
	c := client.NewClient(append(options, client.ContentType("application/json"))...)
	return func() error {
		var rsp Response
		req := c.NewRequest("bench", "Helloworld.Call", &Request{Name: "Alice"})
		return check(c.Call(context.Background(), req, &rsp), rsp.Message)
	}, nil
}

func check(err error, got string) error {
	if err == nil && got != greeting {
		return fmt.Errorf("the reply is %q", got)
	}
	return err
}

func call(form, told string) error {
	var job Job
	if err := json.Unmarshal([]byte(told), &job); err != nil {
		return err
	}
	once, err := newClient(form, job.Port)
	if err != nil {
		return err
	}
	if _, err = run(once, job.Callers, job.WarmUp); err != nil {
		return err
	}
	server, own, start := cpu(^job.ServerPid<<3|2), cpu(unix.CLOCK_PROCESS_CPUTIME_ID), time.Now()
	latencies, err := run(once, job.Callers, job.Seconds)
	took := time.Since(start)
	own, server = cpu(unix.CLOCK_PROCESS_CPUTIME_ID)-own, cpu(^job.ServerPid<<3|2)-server
	if err != nil {
		return err
	}
	slices.Sort(latencies)
	calls := float64(len(latencies))
	at := func(share float64) float64 { return us(latencies[int(share*calls)]) }
	return json.NewEncoder(os.Stdout).Encode(map[string]float64{
		"calls_per_s": calls / took.Seconds(), "p50_us": at(0.5), "p99_us": at(0.99),
		"client_us": us(own) / calls, "server_us": us(server) / calls, "cpu_us": us(own+server) / calls,
	})
}

func run(once func() error, callers int, seconds float64) ([]time.Duration, error) {
	var all []time.Duration
	var failed error
	var lock sync.Mutex
	var group sync.WaitGroup
	end := time.Now().Add(time.Duration(seconds * float64(time.Second)))
	for range callers {
		group.Go(func() {
			var own []time.Duration
			var err error
			for now := time.Now(); now.Before(end) && err == nil; {
				err = once()
				before := now
				now = time.Now()
				own = append(own, now.Sub(before))
			}
			lock.Lock()
			defer lock.Unlock()
			all = append(all, own...)
			if err != nil {
				failed = err
			}
		})
	}
	group.Wait()
	return all, failed
}

// The CPU time of all threads of a process, by the clock that clock_getcpuclockid(3) makes.
func cpu(clock int) time.Duration {
	var spent unix.Timespec
	if err := unix.ClockGettime(int32(clock), &spent); err != nil {
		panic(err)
	}
	return time.Duration(spent.Nano())
}

func us(d time.Duration) float64 { return float64(d.Nanoseconds()) / 1e3 }

func version() {
	info, _ := debug.ReadBuildInfo()
	said := []string{runtime.Version()}
	for _, module := range info.Deps {
		if strings.Contains(module.Path, "go-micro") {
			said = append(said, module.Path+" "+module.Version)
		}
	}
	fmt.Println(strings.Join(said, ", "))
}

func main() {
	if len(os.Args) < 4 {
		version()
		return
	}
	form, mode, what := os.Args[1], os.Args[2], os.Args[3]
	if err := logger.Init(logger.WithLevel(logger.FatalLevel)); err != nil {
		panic(err)
	}
	var err error
	if mode == "serve" {
		err = serve(form, "127.0.0.1:"+what)
	} else {
		err = call(form, what)
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}
