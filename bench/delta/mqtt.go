package main

import (
	"context"
	"crypto/rand"
	"crypto/tls"
	"log/slog"
	"sync"
	"time"

	"github.com/dunlin/dunlin/agent/inband"
	"github.com/dunlin/dunlin/agent/reconcile"
	"github.com/dunlin/dunlin/internal/link"
	dunlinv1 "github.com/dunlin/dunlin/proto/dunlin/v1"
)

// openMQTT gives what fetches over MQTT as the device, and what ends it.
func openMQTT(ctx context.Context, b *bench) (reconcile.Source, func(), error) {
	log := slog.New(slog.DiscardHandler)
	secure := func() *tls.Config { return b.device.TLS(host) }
	l, err := link.New(link.Config{
		BrokerURL: "mqtts://" + b.fleet.MQTT, Device: b.device.Name, BootID: rand.Text(), Log: log, TLS: secure,
		Hello: func() *dunlinv1.Hello {
			return &dunlinv1.Hello{Info: &dunlinv1.DeviceInfo{}, CertificateSerial: b.device.Chain[0].SerialNumber.Bytes()}
		},
	})
	if err != nil {
		return nil, nil, err
	}
	fetcher := inband.New(inband.Config{Log: log, Open: func(ctx context.Context) (inband.Line, error) {
		line, err := l.OpenData(ctx)
		if err != nil {
			return nil, err
		}
		return line, nil
	}})
	ctx, cancel := context.WithCancel(ctx)
	var running sync.WaitGroup
	running.Go(func() { _ = l.Run(ctx) }) // what fails shows in what is fetched
	running.Go(func() { _ = fetcher.Run(ctx) })
	running.Go(func() { // what the controller says is of no use here
		for {
			select {
			case <-l.Inbox():
			case <-ctx.Done():
				return
			}
		}
	})
	stop := func() { cancel(); running.Wait() }
	select {
	case <-l.Connected():
		return fetcher, stop, nil
	case <-time.After(10 * time.Second):
		stop()
		return nil, nil, context.DeadlineExceeded
	}
}
