package agent

import (
	"context"
	"fmt"
	"strings"

	"github.com/dunlin/dunlin/agent/inband"
	"github.com/dunlin/dunlin/agent/reconcile"
	"github.com/dunlin/dunlin/internal/link"
	dunlinv1 "github.com/dunlin/dunlin/proto/dunlin/v1"
)

// newFetcher makes what fetches over MQTT, by the link once there is one.
func (a *agent) newFetcher() *inband.Fetcher {
	return inband.New(inband.Config{Log: a.cfg.Log, Open: func(ctx context.Context) (inband.Line, error) {
		l := a.currentLink()
		if l == nil {
			return nil, fmt.Errorf("fetch: %w", link.ErrNotConnected)
		}
		line, err := l.OpenData(ctx)
		if err != nil {
			return nil, err // and not a Line that holds nil
		}
		return line, nil
	}})
}

// newDelivery makes what chooses between the registry and the fetcher.
func (a *agent) newDelivery() *inband.Delivery {
	controller := a.cfg.Controller
	if a.identity.Joined() {
		controller = a.identity.Stored().ControllerURL
	}
	return inband.NewDelivery(inband.DeliveryConfig{
		Mode: inband.Mode(a.cfg.Delivery), Only: strings.HasPrefix(controller, "mqtts://"), MQTT: a.fetcher, Log: a.cfg.Log,
		Connected: func() bool {
			l := a.currentLink()
			return l != nil && l.Session() != ""
		},
		Event: func(over bool, why string) {
			e := &dunlinv1.Event{Kind: "delivery.mqtt", Severity: dunlinv1.Severity_SEVERITY_WARNING, Message: why}
			if !over {
				e = &dunlinv1.Event{Kind: "delivery.https", Severity: dunlinv1.Severity_SEVERITY_INFO, Message: "the registry is reached again"}
			}
			a.event(e)
		},
	})
}

func (a *agent) currentLink() *link.Link {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.link
}

// origin gives where bundles come from in the end: what was imported, else what
// the network has.
func (a *agent) origin(registry reconcile.Source, at reconcile.Registry) reconcile.Source {
	return &imported{imports: a.imports, Source: a.delivery.Over(registry, at)}
}
