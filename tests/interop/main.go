// An unmodified Go Micro service and client: the HTTP transport, and mDNS or what Go Micro's own
// variables say, as MICRO_REGISTRY=etcd MICRO_REGISTRY_ADDRESS=127.0.0.1:2379.
//
//	interop serve NAME   serve Helloworld.Call and Helloworld.Fail
//	interop call NAME    call them, and one that does not exist; then 1000 calls in a row
//	interop get NAME     print what the registry has of it, as JSON
package main

import (
	"context"
	"encoding/json"
	"fmt"
	"os"
	"os/signal"
	"strings"
	"syscall"

	_ "github.com/go-micro/plugins/v4/registry/etcd"
	micro "go-micro.dev/v4"
	"go-micro.dev/v4/client"
	"go-micro.dev/v4/errors"
	"go-micro.dev/v4/registry"
	"go-micro.dev/v4/server"
)

type Request struct {
	Name string `json:"name"`
}

type Response struct {
	Message string `json:"message"`
}

type Helloworld struct{}

func (h *Helloworld) Call(ctx context.Context, req *Request, rsp *Response) error {
	rsp.Message = "Hello " + req.Name
	return nil
}

func (h *Helloworld) Fail(ctx context.Context, req *Request, rsp *Response) error {
	return errors.BadRequest("helloworld", "name %s is not allowed", req.Name)
}

// Signals are taken from the first line on: Go Micro itself takes them only once it has registered,
// and one that comes before ends the process without a goodbye.
func serve(name string) error {
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM)
	defer stop()
	service := micro.NewService(micro.Context(ctx), micro.HandleSignal(false),
		micro.Server(server.NewServer(
			server.Name(name), server.Id("go"), server.Address("127.0.0.1:0"),
			server.Version("1.2.3"), server.Metadata(map[string]string{"zone": "a"}))))
	service.Init()
	if err := micro.RegisterHandler(service.Server(), new(Helloworld)); err != nil {
		return err
	}
	return service.Run()
}

// Retries are off, so that a failure is seen and not repaired.
func call(name string) error {
	service := micro.NewService()
	service.Init()
	c := service.Client()
	if err := c.Init(client.ContentType("application/json"), client.Retries(0)); err != nil {
		return err
	}
	once := func(endpoint, who string) (string, error) {
		var rsp Response
		err := c.Call(context.Background(), c.NewRequest(name, endpoint, &Request{Name: who}), &rsp)
		return rsp.Message, err
	}
	for _, endpoint := range []string{"Helloworld.Call", "Helloworld.Fail", "Helloworld.Nope"} {
		message, err := once(endpoint, "Gopher")
		fmt.Printf("%s\t%s\t%v\n", endpoint, message, err)
	}
	failed := 0
	for i := 0; i < 1000; i++ {
		message, err := once("Helloworld.Call", fmt.Sprint(i))
		if err != nil || !strings.HasSuffix(message, fmt.Sprint(i)) {
			failed++
		}
	}
	fmt.Printf("failed\t%d\n", failed)
	return nil
}

func get(name string) error {
	service := micro.NewService()
	service.Init()
	found, err := service.Options().Registry.GetService(name)
	if err != nil && err != registry.ErrNotFound { // mDNS has no error for it
		return err
	}
	return json.NewEncoder(os.Stdout).Encode(found)
}

func main() {
	mode, name := os.Args[1], os.Args[2]
	os.Args = os.Args[:1] // Go Micro reads flags of its own
	run := map[string]func(string) error{"serve": serve, "call": call, "get": get}[mode]
	if err := run(name); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}
