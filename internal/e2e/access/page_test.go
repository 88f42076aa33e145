package access

import (
	"flag"
	"fmt"
	"os"
	"strings"
	"testing"

	agentaccess "github.com/dunlin/dunlin/agent/access"
	"github.com/dunlin/dunlin/agent/site"
	"github.com/dunlin/dunlin/controller/identity"
	"github.com/dunlin/dunlin/internal/link"
)

var update = flag.Bool("update", false, "write docs/access.md")

func yes(b bool) string {
	if b {
		return "yes"
	}
	return "no"
}

// TestAccessPage holds docs/access.md to the rules; -update writes it.
func TestAccessPage(t *testing.T) {
	const path = "../../../docs/access.md"
	var page strings.Builder
	page.WriteString(`# Who may do what

What is not here nobody may do. Everything here is tried, by everybody, against running programs: the controller with its own broker and with Mosquitto, and an agent with API keys (` + "`internal/e2e/access`" + `).

## The controller's API and registry

Each line is a rule of the controller. The roles are viewer, operator and admin; each may do what the one before it may. See [users.md](users.md) for roles and scopes.

| action | least role | devices | users with a scope | |
| --- | --- | --- | --- | --- |
`)
	scoping := map[identity.Scoping]string{identity.Ignored: "as without", identity.Within: "within it", identity.Whole: "no"}
	for _, action := range identity.Actions() {
		rule, _ := identity.RuleOf(action)
		least, devices, scope := string(rule.Least), "no", scoping[rule.Scoping]
		if rule.Devices {
			devices = "yes"
		}
		if rule.Least == identity.Anyone {
			least, devices, scope = "none", "yes", "as without"
		}
		name := strings.TrimPrefix(action, "/dunlin.v1.")
		fmt.Fprintf(&page, "| %s | %s | %s | %s | %s |\n", name, least, devices, scope, rule.Note)
	}
	page.WriteString(`
## The broker's topics

A client is a device by its certificate, or enrols: with a join token, as the user that the token names, or as the user ` + "`" + link.RenewUser + "`" + `, as whom anybody may come in. Nobody else connects. Mosquitto may grant a subscription that is not allowed; nothing comes by it.

| topic | devices publish | devices subscribe | who enrols publishes | who enrols subscribes |
| --- | --- | --- | --- | --- |
`)
	device, enrols := &client{device: "own"}, &client{}
	user := link.JoinUser("0123456789ab")
	enrols.login.User = user
	for _, topic := range topics {
		// What is a device's own is nobody's who enrols, and the other way round.
		at := topic.topic("own", "other", user)
		publishes := func(may bool) string {
			if topic.filter {
				return ""
			}
			return yes(may)
		}
		fmt.Fprintf(&page, "| %s | %s | %s | %s | %s |\n", topic.what,
			publishes(device.mayPublish(at)), yes(device.maySubscribe(at)), publishes(enrols.mayPublish(at)), yes(enrols.maySubscribe(at)))
	}
	page.WriteString(`
## An agent's routes

Of an agent with ` + "`--api-keys` or `--client-ca`" + `. A key, or the certificate of a client, is for all models or for some; see [serve.md](serve.md).

| route | who is answered |
| --- | --- |
`)
	needs := map[agentaccess.Need]string{
		agentaccess.Nothing: "everybody", agentaccess.Known: "who has a key or certificate; lists leave out models that it is not for",
		agentaccess.OfModel: "who has one for the model", agentaccess.OfModels: "who has one for all models",
	}
	for _, route := range agentaccess.Routes {
		need := needs[route.Need]
		if route.Need == agentaccess.Nothing && route.Call != "" {
			need = "everybody but who shows a wrong key"
		}
		fmt.Fprintf(&page, "| %s | %s |\n", routeName(route), need)
	}
	page.WriteString(`
## A site's port

Of an agent with ` + "`--site-listen`" + `; see [delivery.md](delivery.md). It is tried in ` + "`agent/site`" + `.

| route | who is answered |
| --- | --- |
`)
	for _, route := range site.Routes {
		fmt.Fprintf(&page, "| %s | every device of the fleet, by its certificate |\n", route)
	}
	page.WriteString("\nThis page is written by `go test ./internal/e2e/access -update`.\n")
	if *update {
		if err := os.WriteFile(path, []byte(page.String()), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	have, err := os.ReadFile(path)
	if err != nil || string(have) != page.String() {
		t.Errorf("%s is not what the rules say (%v); run: go test ./internal/e2e/access -update", path, err)
	}
}
