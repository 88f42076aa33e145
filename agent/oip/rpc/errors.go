package rpc

import (
	"context"
	"errors"
	"strconv"
	"strings"
	"time"

	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/durationpb"

	"github.com/dunlin/dunlin/agent/oip"
)

// pushback is the trailer by which clients with a retry policy delay the next
// attempt, in milliseconds (gRPC proposal A6).
const pushback = "grpc-retry-pushback-ms"

// maxMessage is how many bytes of an error are sent: they travel in a trailer,
// and clients bound those.
const maxMessage = 2 << 10

var statusCodes = map[oip.Code]codes.Code{
	oip.Internal:        codes.Internal,
	oip.InvalidArgument: codes.InvalidArgument,
	oip.Cancelled:       codes.Canceled,
	oip.NotReady:        codes.Unavailable,
	oip.Unauthenticated: codes.Unauthenticated,
	oip.Forbidden:       codes.PermissionDenied,
	oip.NotFound:        codes.NotFound,
	oip.NotAllowed:      codes.Unimplemented,
	oip.TooLarge:        codes.ResourceExhausted,
	oip.TooOften:        codes.ResourceExhausted,
	oip.Unsupported:     codes.Unimplemented,
	oip.Unavailable:     codes.Unavailable,
	oip.Expired:         codes.DeadlineExceeded,
}

// statusOf gives the status of an error, with google.rpc.RetryInfo where it
// says when to try again, and sets the trailer of the call for that.
func statusOf(ctx context.Context, err error) error {
	if err == nil {
		return nil
	}
	e, ok := errors.AsType[*oip.Error](err)
	if !ok {
		if _, ok := errors.AsType[interface {
			error
			GRPCStatus() *status.Status
		}](err); ok { // of the transport
			return err
		}
	}
	st := status.New(statusCodes[oip.CodeOf(err)], messageOf(err))
	if !ok || e.RetryAfter <= 0 {
		return st.Err()
	}
	ms := max(1, int64(e.RetryAfter/time.Millisecond))
	// A stream that has ended takes no trailer, and nobody reads it.
	_ = grpc.SetTrailer(ctx, metadata.Pairs(pushback, strconv.FormatInt(ms, 10)))
	if with, err := st.WithDetails(&errdetails.RetryInfo{RetryDelay: durationpb.New(e.RetryAfter)}); err == nil {
		st = with
	}
	return st.Err()
}

func messageOf(err error) string {
	s := err.Error()
	if len(s) > maxMessage {
		s = s[:maxMessage] + "..."
	}
	return strings.ToValidUTF8(s, "\uFFFD")
}
