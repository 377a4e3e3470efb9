// What main.go takes of Go Micro, and its registries beside mdns, which is its default.
package main

import (
	_ "github.com/asim/go-micro/plugins/registry/consul/v3"
	_ "github.com/asim/go-micro/plugins/registry/etcd/v3"
	_ "github.com/asim/go-micro/plugins/registry/nats/v3"
	micro "github.com/asim/go-micro/v3"
	"github.com/asim/go-micro/v3/client"
	"github.com/asim/go-micro/v3/codec/bytes"
	"github.com/asim/go-micro/v3/errors"
	"github.com/asim/go-micro/v3/registry"
	"github.com/asim/go-micro/v3/server"
)

type (
	Client   = client.Client
	Frame    = bytes.Frame
	Registry = registry.Registry
	Stream   = server.Stream
)

var (
	badRequest      = errors.BadRequest
	conflict        = errors.Conflict
	errNotFound     = registry.ErrNotFound
	handleSignal    = micro.HandleSignal
	newService      = micro.NewService
	registerHandler = micro.RegisterHandler
	withContentType = client.WithContentType
	withContext     = micro.Context
)
