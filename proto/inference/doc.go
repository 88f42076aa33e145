// Package inference holds the messages and the gRPC service of the Open
// Inference Protocol, version 2, generated from the .proto files beside it.
package inference
