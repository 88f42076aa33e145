package e2e

import (
	"cmp"
	"testing"

	"github.com/dunlin/dunlin/internal/e2e/access"
)

// TestAccess tries who may do what.
func TestAccess(t *testing.T) {
	onEachBroker(t, func(t *testing.T, f *Fleet) {
		cli(t, f, "push", digitsFile("v1"), "digits:1")
		result, err := access.Try(within(t), access.Controller{
			URL: f.URL, DeviceURL: f.DeviceURL(), MQTT: f.MQTT, EnrolMQTT: cmp.Or(f.EnrolMQTT, f.MQTT), Data: f.controllerData(), Token: f.Token, Model: "digits",
		})
		report(t, result, err)
	})
}

// TestAccessToAgent tries who may ask an agent with keys for what.
func TestAccessToAgent(t *testing.T) {
	dir := t.TempDir()
	agent, err := access.NewAgent(dir, digitsFile("v1"))
	if err != nil {
		t.Fatal(err)
	}
	alone, err := Serve(within(t), programs.Agent, dir, "agent", library, agent.Args()...)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := alone.Stop(); err != nil || t.Failed() {
			t.Errorf("agent: %v\n%s", err, alone.LogTail(20))
		}
	})
	agent.URL, agent.GRPC = alone.URL, alone.GRPC
	if err := alone.Wait(within(t), agent.Ready); err != nil {
		t.Fatal(err)
	}
	result, err := agent.Try(within(t))
	report(t, result, err)
}

func report(t *testing.T, result access.Result, err error) {
	t.Helper()
	if err != nil {
		t.Error(err)
	}
	t.Logf("%d cells, %d wrong", result.Tried, len(result.Wrong))
	for _, w := range result.Wrong {
		t.Error(w)
	}
}
