package e2e

import (
	"context"
	"crypto/sha256"
	"fmt"
	"os"
	"os/signal"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"google.golang.org/protobuf/encoding/protowire"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protodesc"
	"google.golang.org/protobuf/reflect/protoreflect"
	"google.golang.org/protobuf/types/descriptorpb"
	"google.golang.org/protobuf/types/dynamicpb"

	"github.com/dunlin/dunlin/controller"
	"github.com/dunlin/dunlin/internal/link"
	dunlinv1 "github.com/dunlin/dunlin/proto/dunlin/v1"
)

// wireEnv says as which release the wire of a controller is: older or newer.
const wireEnv = "DUNLIN_E2E_WIRE"

// releasedEnv names the file with the protocol of the release before.
const releasedEnv = "DUNLIN_E2E_RELEASED"

// controllerOfAnotherRelease is dunlin-controller, but between it and its
// devices passes only what two programs of different releases understand of
// each other. Older: what is not in the protocol of the release before is
// lost, on both ways, as between this release and that one. Newer: there are
// fields, values, commands and versions of which neither knows, as between
// this release and the next one.
func controllerOfAnotherRelease() int {
	config, err := controller.LoadConfig(os.Args[1:], os.Getenv, os.Stderr)
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 2
	}
	if config.Wire, err = wireOf(os.Getenv(wireEnv)); err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 2
	}
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGTERM)
	defer stop()
	if err := controller.Run(ctx, config); err != nil {
		fmt.Fprintln(os.Stderr, err)
		return 1
	}
	return 0
}

// messages are what is on the topics, by the last part of their names.
var messages = map[string]proto.Message{
	link.Hello: &dunlinv1.Hello{}, link.Reported: &dunlinv1.Reported{}, link.Events: &dunlinv1.EventBatch{}, link.Telemetry: &dunlinv1.Telemetry{},
	link.Request: &dunlinv1.BlockRequest{}, link.Gone: &dunlinv1.Gone{}, link.Sources: &dunlinv1.SourcesRequest{}, link.Fetch: &dunlinv1.FetchRequest{},
	link.Desired: &dunlinv1.Desired{}, link.Command: &dunlinv1.Command{}, link.Block: &dunlinv1.Block{}, link.Data: &dunlinv1.FetchData{},
	"epoch": &dunlinv1.Epoch{},
}

func wireOf(release string) (func(topic string, payload []byte) []byte, error) {
	change := future
	if release == "older" {
		raw, err := os.ReadFile(os.Getenv(releasedEnv))
		if err != nil {
			return nil, err
		}
		set := &descriptorpb.FileDescriptorSet{}
		if err := proto.Unmarshal(raw, set); err != nil {
			return nil, err
		}
		files, err := protodesc.NewFiles(set)
		if err != nil {
			return nil, err
		}
		change = func(m proto.Message) proto.Message { return past(files, m) }
	}
	return func(topic string, payload []byte) []byte {
		m := messages[topic[strings.LastIndex(topic, "/")+1:]]
		if m == nil {
			return payload // of an enrolment, which has a protocol of its own
		}
		m = m.ProtoReflect().New().Interface()
		if err := proto.Unmarshal(payload, m); err != nil {
			panic(err)
		}
		if d, ok := m.(*dunlinv1.Desired); ok && d.SizeBytes <= link.MaxInlineDocument {
			doc := &dunlinv1.DesiredDocument{}
			if err := proto.Unmarshal(d.Document, doc); err != nil {
				panic(err)
			}
			d.Document = encode(change(doc))
			sum := sha256.Sum256(d.Document)
			d.Sha256, d.SizeBytes = sum[:], uint64(len(d.Document))
		}
		if m = change(m); m == nil {
			return nil
		}
		return encode(m)
	}, nil
}

func encode(m proto.Message) []byte {
	b, err := proto.MarshalOptions{Deterministic: true}.Marshal(m)
	if err != nil {
		panic(err)
	}
	if b == nil {
		b = []byte{}
	}
	return b
}

// past gives what the release before knew of a message; nil: nothing.
func past(files interface {
	FindDescriptorByName(protoreflect.FullName) (protoreflect.Descriptor, error)
}, m proto.Message) proto.Message {
	d, err := files.FindDescriptorByName(m.ProtoReflect().Descriptor().FullName())
	if err != nil {
		return nil
	}
	old := dynamicpb.NewMessage(d.(protoreflect.MessageDescriptor))
	if err := (proto.UnmarshalOptions{DiscardUnknown: true}).Unmarshal(encode(m), old); err != nil {
		panic(err)
	}
	if _, ok := m.(*dunlinv1.Command); ok && len(encode(old)) == 0 {
		return nil // of a kind that it did not have
	}
	return old
}

// future adds to a message what only a release after this one knows.
func future(m proto.Message) proto.Message {
	switch m := m.(type) {
	case *dunlinv1.Command:
		if m.GetEventAck() == nil && m.GetHelloAgain() == nil { // one that this release does not have
			raw := protowire.AppendTag(nil, 900, protowire.BytesType)
			m = &dunlinv1.Command{}
			m.ProtoReflect().SetUnknown(protowire.AppendBytes(raw, []byte("do something new")))
			return m
		}
	case *dunlinv1.Reported:
		m.Versions = append(m.Versions, &dunlinv1.VersionStatus{Model: "from-the-future", Version: 1, State: 99, Reason: "compressed"})
		m.Drifts = append(m.Drifts, &dunlinv1.Drift{Kind: "orbit", Subject: "low", Want: "high"})
		if m.Agent != nil {
			m.Agent.State = 99
		}
	case *dunlinv1.EventBatch:
		for _, e := range m.Events {
			if e.Kind == "version.stored" {
				e.Kind, e.Severity = "version.teleported", 42
			}
		}
	case *dunlinv1.Hello:
		m.Info.Features = append(m.Info.Features, "time travel")
	}
	unknown(m.ProtoReflect())
	return m
}

// unknown adds fields to a message, and to those in it, that nobody knows.
func unknown(m protoreflect.Message) {
	m.Range(func(f protoreflect.FieldDescriptor, v protoreflect.Value) bool {
		switch {
		case f.Kind() != protoreflect.MessageKind || f.IsMap() || f.Message().ParentFile().Package() == "google.protobuf":
		case f.IsList():
			for i := range v.List().Len() {
				unknown(v.List().Get(i).Message())
			}
		default:
			unknown(v.Message())
		}
		return true
	})
	raw := protowire.AppendVarint(protowire.AppendTag(nil, 1000, protowire.VarintType), 7)
	m.SetUnknown(protowire.AppendBytes(protowire.AppendTag(raw, 1001, protowire.BytesType), []byte("new")))
}

// TestOtherReleases takes two versions to a device, and what it says back to
// the controller, where the two know less of each other, or say more, than
// this release does: with agents of the release before and after, and with
// controllers of these.
func TestOtherReleases(t *testing.T) {
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	for _, release := range []string{"older", "newer"} {
		t.Run(release, func(t *testing.T) {
			f, err := NewFleet(programs, t.TempDir(), library)
			if err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() { stop(t, f) })
			env := []string{wireEnv + "=" + release, releasedEnv + "=" + filepath.Join(root, "proto", "released.binpb")}
			if err := f.startController(within(t), self, env); err != nil {
				t.Fatalf("%v\n%s", err, f.Controller.LogTail(50))
			}
			a := startAgent(t, f, "device-1", "--label", "site=here")
			for v := 1; v <= 2; v++ {
				cli(t, f, "push", digitsFile(fmt.Sprintf("v%d", v)), "digits")
				apply(t, f, "digits", v)
				cli(t, f, "rollout", "status", "digits", "--wait")
				if problem := serves(t, a, v); problem != "" {
					t.Fatal(problem)
				}
			}
			eventually(t, func() string {
				n := 0
				for _, e := range events(t, f) {
					if e.Event.Kind == "version.serving" {
						n++
					}
				}
				if n < 2 {
					return fmt.Sprintf("%d of 2 events have come", n)
				}
				return ""
			})
			// Each finds the other again.
			a.Kill()
			if err := f.RestartAgent(within(t), a); err != nil {
				t.Fatal(err)
			}
			f.Controller.Kill()
			if err := f.startController(within(t), self, env); err != nil {
				t.Fatal(err)
			}
			apply(t, f, "digits", 1)
			cli(t, f, "rollout", "status", "digits", "--wait")
			for _, name := range []string{"devices", "models", "deployments", "events"} {
				cli(t, f, "get", name)
			}
		})
	}
}
