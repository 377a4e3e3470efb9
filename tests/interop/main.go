// An unmodified Go Micro service and client: the HTTP transport, and mDNS or what Go Micro's own
// variables say, as MICRO_REGISTRY=etcd MICRO_REGISTRY_ADDRESS=127.0.0.1:2379.
//
//	interop serve NAME   serve Helloworld and Wire
//	interop call NAME    call Helloworld, and what does not exist; then 1000 calls in a row
//	interop wire NAME    call Wire: streams, protobuf, raw bytes
//	interop get NAME     print what the registry has of it, as JSON
package main

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"os/signal"
	"strings"
	"syscall"
	"time"

	_ "github.com/go-micro/plugins/v4/registry/etcd"
	micro "go-micro.dev/v4"
	"go-micro.dev/v4/client"
	"go-micro.dev/v4/codec/bytes"
	"go-micro.dev/v4/errors"
	"go-micro.dev/v4/registry"
	"go-micro.dev/v4/server"
	"google.golang.org/protobuf/types/known/wrapperspb"
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

// Wire has what else the transport carries.
type Wire struct {
	client client.Client
}

// Chat answers each message, until "end" or "fail".
func (w *Wire) Chat(ctx context.Context, stream server.Stream) error {
	for {
		var req Request
		if err := stream.Recv(&req); err == io.EOF {
			return nil
		} else if err != nil {
			return err
		}
		switch req.Name {
		case "end":
			return nil
		case "fail":
			return errors.Conflict("helloworld", "stream failed")
		}
		if err := stream.Send(&Response{Message: "Hello " + req.Name}); err != nil {
			return err
		}
	}
}

// Count waits between its messages: of those that are sent quickly Go Micro sends the last one
// several times.
func (w *Wire) Count(ctx context.Context, stream server.Stream) error {
	var req Request
	if err := stream.Recv(&req); err != nil {
		return err
	}
	for i := 1; i <= 3; i++ {
		if err := stream.Send(&Response{Message: fmt.Sprint(req.Name, " ", i)}); err != nil {
			return err
		}
		time.Sleep(100 * time.Millisecond)
	}
	return nil
}

// Relay calls another service, twice, in the context of its stream, and so with the stream's id.
func (w *Wire) Relay(ctx context.Context, stream server.Stream) error {
	var req Request
	if err := stream.Recv(&req); err != nil {
		return err
	}
	var rsp Response
	for i := 0; i < 2; i++ {
		call := w.client.NewRequest(req.Name, "Helloworld.Call", &Request{Name: fmt.Sprint(i)})
		if err := w.client.Call(ctx, call, &rsp); err != nil {
			return err
		}
	}
	return stream.Send(&rsp)
}

func (w *Wire) Proto(
	ctx context.Context, req *wrapperspb.StringValue, rsp *wrapperspb.StringValue,
) error {
	rsp.Value = "Hello " + req.Value
	return nil
}

func (w *Wire) Raw(ctx context.Context, req *bytes.Frame, rsp *bytes.Frame) error {
	rsp.Data = append([]byte{0, 255}, req.Data...)
	return nil
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
	c, err := caller(service)
	if err != nil {
		return err
	}
	for _, handler := range []interface{}{new(Helloworld), &Wire{client: c}} {
		if err := micro.RegisterHandler(service.Server(), handler); err != nil {
			return err
		}
	}
	return service.Run()
}

// Retries are off, so that a failure is seen and not repaired.
func caller(service micro.Service) (client.Client, error) {
	c := service.Client()
	return c, c.Init(client.ContentType("application/json"), client.Retries(0))
}

func call(name string) error {
	service := micro.NewService()
	service.Init()
	c, err := caller(service)
	if err != nil {
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

// wire prints what comes back, one line each.
func wire(name string) error {
	service := micro.NewService()
	service.Init()
	c, err := caller(service)
	if err != nil {
		return err
	}
	for _, last := range []string{"end", "fail", ""} {
		if err := stream(c, name, "Wire.Chat", "Ann", "Bob", last); err != nil {
			return err
		}
	}
	if err := stream(c, name, "Wire.Count", "Ann"); err != nil {
		return err
	}
	var rsp wrapperspb.StringValue
	proto := client.WithContentType("application/protobuf")
	req := c.NewRequest(name, "Wire.Proto", wrapperspb.String("Ann"), proto)
	err = c.Call(context.Background(), req, &rsp)
	fmt.Printf("Wire.Proto\t%q\t%v\n", rsp.Value, err)
	var frame bytes.Frame
	raw := client.WithContentType("application/octet-stream")
	req = c.NewRequest(name, "Wire.Raw", &bytes.Frame{Data: []byte{1, 0, 2}}, raw)
	err = c.Call(context.Background(), req, &frame)
	fmt.Printf("Wire.Raw\t%x\t%v\n", frame.Data, err)
	return nil
}

// stream says something, waits for an answer to each, then for the end; "" closes it instead.
func stream(c client.Client, name, endpoint string, says ...string) error {
	s, err := c.Stream(context.Background(), c.NewRequest(name, endpoint, &Request{}))
	if err != nil {
		return err
	}
	defer s.Close()
	for _, said := range says {
		if said == "" {
			return s.Close()
		}
		if err := s.Send(&Request{Name: said}); err != nil {
			return err
		}
		var rsp Response
		if err := s.Recv(&rsp); err != nil {
			fmt.Printf("%s\t%s\t%v\n", endpoint, said, err)
			return nil
		}
		fmt.Printf("%s\t%s\t%s\n", endpoint, said, rsp.Message)
	}
	for {
		var rsp Response
		if err := s.Recv(&rsp); err == io.EOF {
			fmt.Printf("%s\tend\n", endpoint)
			return nil
		} else if err != nil {
			return err
		}
		fmt.Printf("%s\t\t%s\n", endpoint, rsp.Message)
	}
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
	run := map[string]func(string) error{"serve": serve, "call": call, "wire": wire, "get": get}[mode]
	if err := run(name); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}
