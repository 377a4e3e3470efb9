// What main.go takes of Go Micro. Its registry is mdns: the plugins for others, v1.0.2, need a package
// that came with v5.2.0.
package main

import (
	micro "go-micro.dev/v5"
	"go-micro.dev/v5/client"
	"go-micro.dev/v5/codec/bytes"
	"go-micro.dev/v5/errors"
	"go-micro.dev/v5/registry"
	"go-micro.dev/v5/server"
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
