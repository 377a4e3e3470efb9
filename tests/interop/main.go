// An unmodified Go Micro service and client, on its defaults: mDNS and the HTTP transport.
//
//	interop serve NAME   serve Helloworld.Call and Helloworld.Fail
//	interop call NAME    call them, and one that does not exist; then 1000 calls in a row
package main

import (
	"context"
	"fmt"
	"os"
	"os/signal"
	"strings"
	"syscall"

	micro "go-micro.dev/v4"
	"go-micro.dev/v4/client"
	"go-micro.dev/v4/errors"
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
			server.Name(name), server.Id("go"), server.Address("127.0.0.1:0"))))
	if err := micro.RegisterHandler(service.Server(), new(Helloworld)); err != nil {
		return err
	}
	return service.Run()
}

// Retries are off, so that a failure is seen and not repaired.
func call(name string) error {
	c := client.NewClient(client.ContentType("application/json"), client.Retries(0))
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

func main() {
	mode, name := os.Args[1], os.Args[2]
	os.Args = os.Args[:1] // Go Micro reads flags of its own
	run := map[string]func(string) error{"serve": serve, "call": call}[mode]
	if err := run(name); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}
