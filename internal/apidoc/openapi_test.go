package apidoc

import (
	"flag"
	"fmt"
	"os"
	"strings"
	"testing"

	"github.com/goccy/go-yaml"
	"google.golang.org/protobuf/reflect/protoreflect"

	"github.com/dunlin/dunlin/controller/identity"
	dunlinv1 "github.com/dunlin/dunlin/proto/dunlin/v1"
)

var update = flag.Bool("update", false, "write docs/protocol")

const head = "# Written by `go test ./internal/apidoc -update`.\n"

// hold holds a file to what it should be; -update writes it.
func hold(t *testing.T, path string, want object) {
	t.Helper()
	b, err := yaml.MarshalWithOptions(want, yaml.IndentSequence(true))
	if err != nil {
		t.Fatal(err)
	}
	text := head + string(b)
	if *update {
		if err := os.WriteFile(path, []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	if have, err := os.ReadFile(path); err != nil || string(have) != text {
		t.Errorf("%s is not what the programs speak (%v); run: go test ./internal/apidoc -update", path, err)
	}
}

// openAPI describes the services of a file.
func openAPI(t *testing.T, services protoreflect.ServiceDescriptors) object {
	s := &schemas{comments: comments(t), made: map[string]object{
		"Error": {
			item("type", "object"), item("description", "What every call answers that fails, with a status other than 200."),
			item("properties", object{
				item("code", object{item("type", "string"), item("description", "A code of Connect: invalid_argument, not_found, already_exists, failed_precondition, unauthenticated, permission_denied, resource_exhausted, unavailable, internal.")}),
				item("message", object{item("type", "string"), item("description", "Of a fault in the request: field, value and limit.")}),
			}),
			item("required", []string{"code"}),
		},
	}}
	var paths object
	var tagList []object
	for i := range services.Len() {
		service := services.Get(i)
		tagList = append(tagList, s.said(object{item("name", name(service))}, service))
		for j := range service.Methods().Len() {
			m := service.Methods().Get(j)
			path := fmt.Sprintf("/%s/%s", service.FullName(), m.Name())
			rule, ok := identity.RuleOf(path)
			if !ok {
				t.Errorf("%s has no rule", path)
			}
			kind := "application/json"
			if m.IsStreamingServer() || m.IsStreamingClient() {
				kind = "application/connect+json" // in envelopes of five bytes and a message
			}
			body := func(d protoreflect.MessageDescriptor) object {
				return object{item(kind, object{item("schema", s.ref(d))})}
			}
			post := object{item("operationId", name(service)+"."+string(m.Name())), item("tags", []string{name(service)})}
			post = s.said(post, m)
			if rule.Least == identity.Anyone {
				post = append(post, item("security", []object{}))
			} else {
				post = append(post, item("x-least-role", string(rule.Least)))
			}
			post = append(post,
				item("requestBody", object{item("required", true), item("content", body(m.Input()))}),
				item("responses", object{
					item("200", object{item("description", "It is done."), item("content", body(m.Output()))}),
					item("default", object{item("description", "It failed."), item("content", object{item("application/json", object{item("schema", object{item("$ref", "#/components/schemas/Error")})})})}),
				}))
			paths = append(paths, item(path, object{item("post", post)}))
		}
	}
	return object{
		item("openapi", "3.1.0"),
		item("info", object{
			item("title", "Dunlin, the controller's API"), item("version", "v1"),
			item("description", "Connect over HTTP, as curl can call it: each call is a POST of a JSON object, {} where there is nothing to say. The same calls are there by gRPC and gRPC-Web, on the same port. Fields that have their default are left out of answers. docs/access.md has who may do what."),
			item("license", object{item("name", "Apache 2.0"), item("identifier", "Apache-2.0")}),
		}),
		item("servers", []object{{item("url", "https://controller.example.com:8080")}}),
		item("security", []object{{item("token", []string{})}}),
		item("tags", tagList),
		item("paths", paths),
		item("components", object{
			item("securitySchemes", object{item("token", object{item("type", "http"), item("scheme", "bearer"), item("description", "An API token: dunlin token create.")})}),
			item("schemas", s.all()),
		}),
	}
}

// TestOpenAPI holds docs/protocol/openapi.yaml to the services.
func TestOpenAPI(t *testing.T) {
	doc := openAPI(t, dunlinv1.File_dunlin_v1_api_proto.Services())
	hold(t, "../../docs/protocol/openapi.yaml", doc)
	whole := plain(t, doc)
	official(t, whole)
	references(t, whole)
	compiled := compile(t, whole)
	for _, m := range samples() {
		valid(t, compiled, m)
	}
	for path := range whole["paths"].(map[string]any) {
		if !strings.HasPrefix(path, "/dunlin.v1.") {
			t.Errorf("path %s", path)
		}
	}
}
