package link

import (
	"fmt"
	"hash/fnv"
	"slices"
	"strconv"
	"strings"
)

// The limits of the wire.
const (
	// MaxPayload bounds the payload of every message.
	MaxPayload = 128 << 10
	// MaxInlineDocument bounds a desired document that travels inside its
	// Desired message; a larger one is asked for in blocks.
	MaxInlineDocument = 64 << 10
	// MaxBlock bounds the data of one Block.
	MaxBlock = 64 << 10
	// MinFetchBlock bounds the blocks of a FetchRequest from below, and
	// MaxBlock from above.
	MinFetchBlock = 4 << 10
	// MaxWanted bounds the blocks that one FetchRequest asks for.
	MaxWanted = 256
	// Shards is the number of shards that devices are spread over.
	Shards = 256
	// MaxDeviceName bounds the name of a device.
	MaxDeviceName = 64
)

// The last segment of a topic: what a message on it is.
const (
	Desired   = "desired"   // down: dunlinv1.Desired
	Command   = "command"   // down: dunlinv1.Command
	Block     = "block"     // down: dunlinv1.Block
	Data      = "data"      // down: dunlinv1.FetchData
	Hello     = "hello"     // up: dunlinv1.Hello
	Reported  = "reported"  // up: dunlinv1.Reported
	Events    = "events"    // up: dunlinv1.EventBatch
	Telemetry = "telemetry" // up: dunlinv1.Telemetry
	Request   = "request"   // up: dunlinv1.BlockRequest
	Fetch     = "fetch"     // up: dunlinv1.FetchRequest
	Sources   = "sources"   // up: dunlinv1.SourcesRequest
	Gone      = "gone"      // up: dunlinv1.Gone
)

const (
	root = "dunlin/v1/"
	// EpochTopic carries dunlinv1.Epoch from the controller to every agent.
	EpochTopic = root + "controller/epoch"
	// UpFilter matches everything that devices send.
	UpFilter = root + "+/+/up/+"
)

var downKinds = []string{Desired, Command, Block, Data}
var upKinds = []string{Hello, Reported, Events, Telemetry, Request, Fetch, Sources, Gone}

// controlKinds are those that every session subscribes to.
var controlKinds = []string{Desired, Command, Block}

// CheckDevice says whether name can be the name of a device: 1 to
// MaxDeviceName of A-Z a-z 0-9 _ -, the characters that every broker takes.
func CheckDevice(name string) error {
	if name == "" || len(name) > MaxDeviceName {
		return fmt.Errorf("device name %q has %d characters, allowed are 1 to %d", name, len(name), MaxDeviceName)
	}
	for _, c := range []byte(name) {
		if !(c >= 'A' && c <= 'Z' || c >= 'a' && c <= 'z' || c >= '0' && c <= '9' || c == '_' || c == '-') {
			return fmt.Errorf("device name %q holds %q, allowed are A-Z a-z 0-9 _ -", name, c)
		}
	}
	return nil
}

// Shard gives the shard of a device: the 32-bit FNV-1a hash of its name
// modulo Shards.
func Shard(device string) uint32 {
	h := fnv.New32a()
	h.Write([]byte(device))
	return h.Sum32() % Shards
}

// DataClient gives the client id of a device's second connection, by which it
// fetches bundles where the broker lets it have one. No device has it as its
// name.
func DataClient(device string) string { return device + ".data" }

func subtree(device string) string {
	return root + strconv.Itoa(int(Shard(device))) + "/" + device + "/"
}

// Down gives the topic of a kind of message to a device.
func Down(device, kind string) string { return subtree(device) + "down/" + kind }

// Up gives the topic of a kind of message from a device.
func Up(device, kind string) string { return subtree(device) + "up/" + kind }

// ParseUp takes a topic apart that a device published on, and refuses every
// other topic.
func ParseUp(topic string) (device, kind string, err error) { return parse(topic, "up", upKinds) }

// ParseDown takes a topic apart that the controller published on.
func ParseDown(topic string) (device, kind string, err error) { return parse(topic, "down", downKinds) }

func parse(topic, direction string, kinds []string) (device, kind string, err error) {
	rest, ok := strings.CutPrefix(topic, root)
	parts := strings.Split(rest, "/")
	if !ok || len(parts) != 4 || parts[2] != direction {
		return "", "", fmt.Errorf("topic %q is not %s<shard>/<device>/%s/<kind>", topic, root, direction)
	}
	device, kind = parts[1], parts[3]
	if err := CheckDevice(device); err != nil {
		return "", "", fmt.Errorf("topic %q: %w", topic, err)
	}
	if want := strconv.Itoa(int(Shard(device))); parts[0] != want {
		return "", "", fmt.Errorf("topic %q: device %s is in shard %s", topic, device, want)
	}
	if slices.Contains(kinds, kind) {
		return device, kind, nil
	}
	return "", "", fmt.Errorf("topic %q: unknown kind %q", topic, kind)
}

// DeviceMaySubscribe says whether a device may subscribe to a filter: its own
// down topics, one by one or all by "+" or "#", and the epoch.
func DeviceMaySubscribe(device, filter string) bool {
	if filter == EpochTopic || filter == subtree(device)+"down/#" || filter == subtree(device)+"down/+" {
		return true
	}
	d, _, err := ParseDown(filter)
	return err == nil && d == device
}

// DeviceMayPublish says whether a device may publish on a topic: its own up
// topics.
func DeviceMayPublish(device, topic string) bool {
	d, _, err := ParseUp(topic)
	return err == nil && d == device
}

// DataMaySubscribe and DataMayPublish say the same of a device's second
// connection, which is for Fetch and Data only.
func DataMaySubscribe(device, filter string) bool { return filter == Down(device, Data) }

// DataMayPublish: see DataMaySubscribe.
func DataMayPublish(device, topic string) bool { return topic == Up(device, Fetch) }
