package follow

import (
	"context"
	"fmt"
	"strings"

	"github.com/dunlin/dunlin/agent/inband"
	"github.com/dunlin/dunlin/internal/link"
	dunlinv1 "github.com/dunlin/dunlin/proto/dunlin/v1"
)

// newFetcher makes what fetches over MQTT, by the link once there is one.
func (f *Follower) newFetcher() *inband.Fetcher {
	return inband.New(inband.Config{Log: f.cfg.Log, Open: func(ctx context.Context) (inband.Line, error) {
		l := f.Link()
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
func (f *Follower) newDelivery() *inband.Delivery {
	controller := f.cfg.Identity.Controller
	if f.Identity.Joined() {
		controller = f.Identity.Stored().ControllerURL
	}
	return inband.NewDelivery(inband.DeliveryConfig{
		Mode: f.cfg.Delivery, Only: strings.HasPrefix(controller, "mqtts://"), MQTT: f.fetcher, Log: f.cfg.Log,
		Connected: func() bool {
			l := f.Link()
			return l != nil && l.Session() != ""
		},
		Event: func(over bool, why string) {
			e := &dunlinv1.Event{Kind: "delivery.mqtt", Severity: dunlinv1.Severity_SEVERITY_WARNING, Message: why}
			if !over {
				e = &dunlinv1.Event{Kind: "delivery.https", Severity: dunlinv1.Severity_SEVERITY_INFO, Message: "the registry is reached again"}
			}
			f.Event(e)
		},
	})
}
