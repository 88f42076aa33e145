package apidoc

import (
	"go/ast"
	"go/parser"
	"go/token"
	"regexp"
	"strconv"
	"strings"
	"testing"

	"google.golang.org/protobuf/reflect/protoreflect"
	"google.golang.org/protobuf/reflect/protoregistry"

	"github.com/dunlin/dunlin/internal/link"
)

// A topic carries one kind of message.
type topic struct {
	key, address, message string
	up                    bool // devices send it
	what                  string
}

// topics gives those of a device from the constants in internal/link, whose
// comments say direction and message, and those of everybody.
func topics(t *testing.T) (all []topic) {
	t.Helper()
	file, err := parser.ParseFile(token.NewFileSet(), "../link/topics.go", nil, parser.ParseComments)
	if err != nil {
		t.Fatal(err)
	}
	says := regexp.MustCompile(`^(up|down): dunlinv1\.(\w+)$`)
	address := func(topic string) string {
		parts := strings.Split(topic, "/")
		parts[2], parts[3] = "{shard}", "{device}"
		return strings.Join(parts, "/")
	}
	for _, d := range file.Decls {
		g, ok := d.(*ast.GenDecl)
		if !ok || g.Tok != token.CONST || !strings.HasPrefix(g.Doc.Text(), "The last segment of a topic") {
			continue
		}
		for _, spec := range g.Specs {
			v := spec.(*ast.ValueSpec)
			kind, err := strconv.Unquote(v.Values[0].(*ast.BasicLit).Value)
			m := says.FindStringSubmatch(strings.TrimSpace(v.Comment.Text()))
			if err != nil || m == nil {
				t.Errorf("%s: its comment is not its direction and message", v.Names[0])
				continue
			}
			one := topic{key: kind, message: m[2], up: m[1] == "up"}
			if at := link.Up("d", kind); one.up {
				_, _, err = link.ParseUp(at)
				one.address = address(at)
			} else {
				_, _, err = link.ParseDown(link.Down("d", kind))
				one.address = address(link.Down("d", kind))
			}
			if err != nil {
				t.Errorf("%s: %v", kind, err)
			}
			all = append(all, one)
		}
	}
	return append(all,
		topic{key: "epoch", address: link.EpochTopic, message: "Epoch", what: "To every device."},
		topic{key: "join-up", address: link.JoinUp("{user}", "{nonce}"), message: "EnrolRequest", up: true, what: "Of a device without a certificate that counts."},
		topic{key: "join-down", address: link.JoinDown("{user}", "{nonce}"), message: "EnrolResponse"})
}

// asyncAPI describes what crosses MQTT, from where a device stands.
func asyncAPI(t *testing.T) object {
	s := &schemas{comments: comments(t), made: map[string]object{}}
	var channels, operations, messages object
	parameters := map[string]string{
		"shard":  "The 32-bit FNV-1a hash of the device's name modulo " + strconv.Itoa(link.Shards) + ".",
		"device": "The name of the device: 1 to " + strconv.Itoa(link.MaxDeviceName) + " of A-Z a-z 0-9 _ -.",
		"user":   "The MQTT user: " + link.RenewUser + ", or join. and the id of a join token.",
		"nonce":  "Chosen by the device; tells the conversations of a user apart.",
	}
	for _, topic := range topics(t) {
		d, err := protoregistry.GlobalFiles.FindDescriptorByName(protoreflect.FullName("dunlin.v1." + topic.message))
		if err != nil {
			t.Errorf("%s: %v", topic.key, err)
			continue
		}
		channel := object{item("address", topic.address)}
		if topic.what != "" {
			channel = append(channel, item("description", topic.what))
		}
		var ps object
		for _, m := range regexp.MustCompile(`\{(\w+)\}`).FindAllStringSubmatch(topic.address, -1) {
			ps = append(ps, item(m[1], object{item("description", parameters[m[1]])}))
		}
		if ps != nil {
			channel = append(channel, item("parameters", ps))
		}
		channel = append(channel, item("messages", object{item(topic.message, object{item("$ref", "#/components/messages/"+topic.message)})}))
		channels = append(channels, item(topic.key, channel))
		action := "receive"
		if topic.up {
			action = "send"
		}
		operations = append(operations, item(topic.key, object{
			item("action", action), item("channel", object{item("$ref", "#/channels/"+topic.key)}),
			item("messages", []object{{item("$ref", "#/channels/"+topic.key+"/messages/"+topic.message)}}),
			item("bindings", object{item("mqtt", object{item("qos", 0), item("retain", false)})}),
		}))
		messages = append(messages, item(topic.message, s.said(object{
			item("name", "dunlin.v1."+topic.message), item("contentType", "application/x-protobuf"),
			item("payload", s.ref(d)),
		}, d)))
	}
	return object{
		item("asyncapi", "3.0.0"),
		item("info", object{
			item("title", "Dunlin, between device and controller"), item("version", "v1"),
			item("description", "MQTT over TLS 1.3. Payloads are protobuf's binary form of the messages in proto/dunlin/v1, at most "+strconv.Itoa(link.MaxPayload)+" bytes; the schemas here show their fields in its JSON form. Operations are as a device sees them: it sends up and receives down. All is QoS 0, nothing is retained: what matters is sent again."),
		}),
		item("servers", object{item("controller", object{item("host", "controller.example.com:8883"), item("protocol", "mqtts"), item("protocolVersion", "3.1.1")})}),
		item("defaultContentType", "application/x-protobuf"),
		item("channels", channels),
		item("operations", operations),
		item("components", object{item("messages", messages), item("schemas", s.all())}),
	}
}

// TestAsyncAPI holds docs/protocol/asyncapi.yaml to the topics.
func TestAsyncAPI(t *testing.T) {
	doc := asyncAPI(t)
	hold(t, "../../docs/protocol/asyncapi.yaml", doc)
	whole := plain(t, doc)
	references(t, whole)
	compile(t, whole)
	if n := len(whole["channels"].(map[string]any)); n < 15 {
		t.Errorf("only %d topics", n)
	}
	for key, c := range whole["channels"].(map[string]any) {
		c := c.(map[string]any)
		parameters, _ := c["parameters"].(map[string]any)
		for _, m := range regexp.MustCompile(`\{(\w+)\}`).FindAllStringSubmatch(c["address"].(string), -1) {
			if _, ok := parameters[m[1]]; !ok {
				t.Errorf("%s: parameter %s is not described", key, m[1])
			}
		}
	}
}
