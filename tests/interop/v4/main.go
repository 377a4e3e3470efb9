// A service of unmodified Go Micro that is also a client: it serves Helloworld and Wire, and does
// what each line of its standard input says, which it answers with one line of JSON:
//
//	get SERVICE                            what the registry has of it
//	call SERVICE ENDPOINT NAME             a call with JSON
//	calls SERVICE COUNT                    how many calls in a row fail
//	proto SERVICE NAME                     a call with protobuf
//	raw SERVICE HEX                        a call with bytes, of any kind
//	stream SERVICE ENDPOINT [NAME] ...     an answer to each, and then all there is; "close" ends it
//
// All settings are Go Micro's own variables, such as MICRO_SERVER_NAME and MICRO_REGISTRY. SIGTERM,
// or the end of the input, stops it. This file is the same for each version of Go Micro, of which
// micro.go has what differs: v3 and v5 link to it.
package main

import (
	"bufio"
	"context"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"os/signal"
	"strconv"
	"strings"
	"syscall"
	"time"

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
	return badRequest("helloworld", "name %s is not allowed", req.Name)
}

// Wire has what else the transport carries.
type Wire struct {
	client Client
}

// Chat answers each message, until "end" or "fail".
func (w *Wire) Chat(ctx context.Context, stream Stream) error {
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
			return conflict("helloworld", "stream failed")
		}
		if err := stream.Send(&Response{Message: "Hello " + req.Name}); err != nil {
			return err
		}
	}
}

// Count waits between its messages: of those that are sent quickly Go Micro sends the last one
// several times.
func (w *Wire) Count(ctx context.Context, stream Stream) error {
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
func (w *Wire) Relay(ctx context.Context, stream Stream) error {
	var req Request
	if err := stream.Recv(&req); err != nil {
		return err
	}
	var rsp Response
	for i := 0; i < 2; i++ {
		call := w.client.NewRequest(req.Name, "Helloworld.Call", &Request{fmt.Sprint(i)}, inJSON)
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

func (w *Wire) Raw(ctx context.Context, req *Frame, rsp *Frame) error {
	rsp.Data = append([]byte{0, 255}, req.Data...)
	return nil
}

var (
	inJSON  = withContentType("application/json")
	inProto = withContentType("application/protobuf")
	inBytes = withContentType("application/octet-stream")
)

// caller is the client's side.
type caller struct {
	client   Client
	registry Registry
}

// answer is what a line of the input is answered with; there may be a result and an error.
type answer struct {
	Result interface{} `json:"result"`
	Error  string      `json:"error"`
}

func (c *caller) obey(lines io.Reader, answers io.Writer) error {
	input := bufio.NewScanner(lines)
	for input.Scan() {
		result, err := c.do(strings.Fields(input.Text()))
		told := answer{Result: result}
		if err != nil {
			told.Error = err.Error()
		}
		if err := json.NewEncoder(answers).Encode(told); err != nil {
			return err
		}
	}
	return input.Err()
}

func (c *caller) do(words []string) (interface{}, error) {
	order, service, rest := words[0], words[1], words[2:]
	switch order {
	case "get":
		return c.get(service)
	case "call":
		return c.call(service, rest[0], rest[1])
	case "calls":
		return c.calls(service, rest[0])
	case "proto":
		return c.proto(service, rest[0])
	case "raw":
		return c.raw(service, rest[0])
	case "stream":
		return c.stream(service, rest[0], rest[1:])
	}
	return nil, fmt.Errorf("no order %s", order)
}

func (c *caller) get(service string) (interface{}, error) {
	found, err := c.registry.GetService(service)
	if err == errNotFound { // mDNS has no error for it
		err = nil
	}
	return found, err
}

func (c *caller) call(service, endpoint, name string) (string, error) {
	var rsp Response
	req := c.client.NewRequest(service, endpoint, &Request{Name: name}, inJSON)
	err := c.client.Call(context.Background(), req, &rsp)
	return rsp.Message, err
}

func (c *caller) calls(service, count string) (int, error) {
	wanted, err := strconv.Atoi(count)
	if err != nil {
		return 0, err
	}
	failed := 0
	for i := 0; i < wanted; i++ {
		said, err := c.call(service, "Helloworld.Call", fmt.Sprint(i))
		if err != nil || said != fmt.Sprint("Hello ", i) {
			failed++
		}
	}
	return failed, nil
}

func (c *caller) proto(service, name string) (string, error) {
	var rsp wrapperspb.StringValue
	req := c.client.NewRequest(service, "Wire.Proto", wrapperspb.String(name), inProto)
	err := c.client.Call(context.Background(), req, &rsp)
	return rsp.Value, err
}

func (c *caller) raw(service, digits string) (string, error) {
	data, err := hex.DecodeString(digits)
	if err != nil {
		return "", err
	}
	var rsp Frame
	req := c.client.NewRequest(service, "Wire.Raw", &Frame{Data: data}, inBytes)
	err = c.client.Call(context.Background(), req, &rsp)
	return hex.EncodeToString(rsp.Data), err
}

// stream says something, waits for an answer to each, and then for the end, which is an EOF.
func (c *caller) stream(service, endpoint string, says []string) ([]string, error) {
	req := c.client.NewRequest(service, endpoint, &Request{}, inJSON)
	s, err := c.client.Stream(context.Background(), req)
	if err != nil {
		return nil, err
	}
	defer s.Close()
	said := []string{}
	for i := 0; ; i++ {
		if i < len(says) && says[i] == "close" {
			return said, s.Close()
		}
		if i < len(says) {
			if err := s.Send(&Request{Name: says[i]}); err != nil {
				return said, err
			}
		}
		var rsp Response
		if err := s.Recv(&rsp); err != nil {
			return said, err
		}
		said = append(said, rsp.Message)
	}
}

// Signals are taken from the first line on: Go Micro itself takes them only once it has registered,
// and one that comes before ends the process without a goodbye.
func run(answers io.Writer) error {
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM)
	defer stop()
	service := newService(withContext(ctx), handleSignal(false))
	service.Init()
	for _, handler := range []interface{}{new(Helloworld), &Wire{service.Client()}} {
		if err := registerHandler(service.Server(), handler); err != nil {
			return err
		}
	}
	go func() {
		defer stop()
		calls := &caller{service.Client(), service.Options().Registry}
		if err := calls.obey(os.Stdin, answers); err != nil {
			fmt.Fprintln(os.Stderr, err)
		}
	}()
	return service.Run()
}

func main() {
	answers := os.Stdout
	os.Stdout = os.Stderr // where Go Micro's log goes to
	if err := run(answers); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}
