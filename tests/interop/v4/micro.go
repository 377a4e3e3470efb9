// What main.go takes of Go Micro, and its registries beside mdns, which is its default.
package main

import (
	_ "github.com/go-micro/plugins/v4/registry/consul"
	_ "github.com/go-micro/plugins/v4/registry/etcd"
	_ "github.com/go-micro/plugins/v4/registry/nats"
	micro "go-micro.dev/v4"
	"go-micro.dev/v4/client"
	"go-micro.dev/v4/codec/bytes"
	"go-micro.dev/v4/errors"
	"go-micro.dev/v4/registry"
	"go-micro.dev/v4/server"
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
