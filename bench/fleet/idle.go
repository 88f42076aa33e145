package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"connectrpc.com/connect"

	"github.com/dunlin/dunlin/agent/simfleet"
	"github.com/dunlin/dunlin/internal/e2e"
	"github.com/dunlin/dunlin/internal/e2e/byhand"
	dunlinv1 "github.com/dunlin/dunlin/proto/dunlin/v1"
	"github.com/dunlin/dunlin/proto/dunlin/v1/dunlinv1connect"
)

const (
	// idleModels are served by each device whose traffic is counted.
	idleModels = 4
	// idleAgents are the agents among them that are processes of their own, one
	// of each class.
	idleAgents = 2
	// settle is the time from a change to the moment from which on nothing of
	// what travels comes of it: leases for figures end after a minute, and the
	// first epoch that a device hears, one a minute, has it say hello again.
	settle = 150 * time.Second
	// headers are what IPv4 and TCP with time stamps add to a message, and to
	// the acknowledgement that it is answered with.
	headers = 2 * 52
	// gateway is where the agents that are processes believe the controller to
	// be: what is passed on from there is counted.
	gateway = "127.0.0.2"
)

// meter counts what connections carry, each by itself.
type meter struct {
	mu    sync.Mutex // guards what follows
	conns []*counted
}

// counted is a connection whose bytes are counted, as TCP carries them.
type counted struct {
	net.Conn
	sent, received, messages atomic.Int64
}

// Read implements net.Conn.
func (c *counted) Read(p []byte) (int, error) {
	n, err := c.Conn.Read(p)
	c.received.Add(int64(n))
	c.messages.Add(1)
	return n, err
}

// Write implements net.Conn.
func (c *counted) Write(p []byte) (int, error) {
	n, err := c.Conn.Write(p)
	c.sent.Add(int64(n))
	c.messages.Add(1)
	return n, err
}

func (m *meter) count(c net.Conn) *counted {
	m.mu.Lock()
	defer m.mu.Unlock()
	m.conns = append(m.conns, &counted{Conn: c})
	return m.conns[len(m.conns)-1]
}

// total is what devices have sent and received, in bytes and messages.
type total struct{ sent, received, messages int64 }

func (t total) bytes() int64 { return t.sent + t.received }

func (t total) less(o total) total {
	return total{t.sent - o.sent, t.received - o.received, t.messages - o.messages}
}

// read gives what each connection has carried, in the order in which they were
// opened.
func (m *meter) read() []total {
	m.mu.Lock()
	defer m.mu.Unlock()
	all := make([]total, len(m.conns))
	for i, c := range m.conns {
		all[i] = total{c.sent.Load(), c.received.Load(), c.messages.Load()}
	}
	return all
}

// since gives what was carried since a reading, by all and by the one
// connection that has carried most, and how many were opened.
func (m *meter) since(before []total) (sum, most total, opened int) {
	now := m.read()
	for i, t := range now {
		if i < len(before) {
			t = t.less(before[i])
		}
		sum = total{sum.sent + t.sent, sum.received + t.received, sum.messages + t.messages}
		if t.bytes() > most.bytes() {
			most = t
		}
	}
	return sum, most, len(now) - len(before)
}

// pass accepts connections to address until ctx is done, and passes them on to
// the same port of the machine itself.
func (m *meter) pass(ctx context.Context, address string) (stop func(), err error) {
	_, port, err := net.SplitHostPort(address)
	if err != nil {
		return nil, err
	}
	l, err := net.Listen("tcp", net.JoinHostPort(gateway, port))
	if err != nil {
		return nil, err
	}
	ctx, cancel := context.WithCancel(ctx)
	var running sync.WaitGroup
	running.Go(func() {
		for {
			near, err := l.Accept()
			if err != nil {
				return
			}
			running.Go(func() {
				defer near.Close()
				far, err := new(net.Dialer).DialContext(ctx, "tcp", net.JoinHostPort(host, port))
				if err != nil {
					return
				}
				far = m.count(far)
				defer context.AfterFunc(ctx, func() {
					near.Close()
					far.Close()
				})()
				var both sync.WaitGroup
				copyTo := func(to, from net.Conn) {
					_, _ = io.Copy(to, struct{ io.Reader }{from}) // by Read and Write, which count
					to.Close()
				}
				both.Go(func() { copyTo(struct{ net.Conn }{far}, near) })
				both.Go(func() { copyTo(near, far) })
				both.Wait()
			})
		}
	})
	return func() {
		cancel()
		l.Close()
		running.Wait()
	}, nil
}

// idleSize says how much a count of idle traffic measures.
type idleSize struct {
	devices          int
	settle, duration time.Duration
}

// idleFigures are what an idle device and an idle agent have sent and received.
type idleFigures struct {
	idleSize
	device, most total // of a simulated device on average; of the one with most
	agent        total // of the agent, of those that are processes, with most
	opened       int   // connections while it was counted
}

func (f *idleFigures) hourly(n int64) float64 { return float64(n) / f.duration.Hours() / 1e3 }

func (f *idleFigures) print(w io.Writer) {
	line := func(who string, t total) {
		fmt.Fprintf(w, "%s: %.1f kB an hour, TLS included: %.1f sent, %.1f received, in %.0f messages; with headers and acknowledgements at most %.1f kB\n",
			who, f.hourly(t.bytes()), f.hourly(t.sent), f.hourly(t.received), float64(t.messages)/f.duration.Hours(), f.hourly(t.bytes()+headers*t.messages))
	}
	fmt.Fprintf(w, "counted over %v, from %v after the last change on; %d models a device; %d connections were opened meanwhile\n", f.duration, f.settle, idleModels, f.opened)
	line("a simulated device that answers a request a second for each model", f.device)
	line("the one of these with most", f.most)
	line(fmt.Sprintf("of %d agents, processes with simulated machines and no requests, the one with most", idleAgents), f.agent)
	fmt.Fprintf(w, "idle: devices=%d minutes=%.1f device_kb_h=%.1f most_kb_h=%.1f agent_kb_h=%.1f\n",
		f.devices, f.duration.Minutes(), f.hourly(f.device.bytes()), f.hourly(f.most.bytes()), f.hourly(f.agent.bytes()))
}

// measureIdle counts what devices say and hear while nothing changes, against
// one controller, whose data is in dir.
func measureIdle(ctx context.Context, s idleSize, programs e2e.Programs, root, dir string, progress io.Writer) (_ *idleFigures, err error) {
	if err := os.Mkdir(dir, 0o700); err != nil {
		return nil, err
	}
	controller, err := e2e.NewFleet(programs, dir, "")
	if err != nil {
		return nil, err
	}
	controller.ControllerArgs = []string{"--log-level", "warn", "--hosts", gateway + "," + host}
	defer func() {
		if err = errors.Join(err, controller.Stop()); err != nil && controller.Controller != nil {
			err = fmt.Errorf("%w\n%s", err, controller.Controller.LogTail(20))
		}
	}()
	if err := controller.StartController(ctx); err != nil {
		return nil, err
	}
	var devices, agents meter
	for _, address := range []string{controller.MQTT, strings.TrimPrefix(controller.URL, "http://")} {
		stop, err := agents.pass(ctx, address)
		if err != nil {
			return nil, err
		}
		defer stop()
	}
	cfg, err := fleetConfig(ctx, controller, s.devices, dir, progress)
	if err != nil {
		return nil, err
	}
	cfg.RequestsPerSecond = 1
	cfg.Dial = func(ctx context.Context, network, address string) (net.Conn, error) {
		c, err := new(net.Dialer).DialContext(ctx, network, strings.Replace(address, gateway, host, 1))
		if err != nil {
			return nil, err
		}
		return devices.count(c), nil
	}
	fleet, err := simfleet.New(cfg)
	if err != nil {
		return nil, err
	}
	b := &bench{controller: controller, fleet: fleet, progress: progress}
	b.devices = s.devices
	stop := b.start(ctx)
	defer stop()
	if _, err := b.until(ctx, "joining", b.look(), b.connected); err != nil {
		return nil, err
	}
	for i := range idleAgents {
		class := classes[i%len(classes)]
		_, err := controller.StartAgent(ctx, "agent-"+class, "--sim-device", class, "--controller", strings.Replace(controller.DeviceURL(), host, gateway, 1))
		if err != nil {
			return nil, err
		}
	}
	for i := range idleModels {
		name := fmt.Sprint(model, "-", i)
		if _, err := controller.CLI(ctx, "push", filepath.Join(root, "models/examples/digits/v1.onnx"), name+":1"); err != nil {
			return nil, err
		}
		if err := b.deploy(ctx, name, 1); err != nil {
			return nil, err
		}
	}
	if _, err := b.until(ctx, "serving", 100*time.Millisecond, func() (bool, string) { return b.serveAll(ctx) }); err != nil {
		return nil, err
	}
	fmt.Fprintf(progress, "waiting for %v, then counting for %v\n", s.settle, s.duration)
	if err := pause(ctx, s.settle); err != nil {
		return nil, err
	}
	beforeDevices, beforeAgents := devices.read(), agents.read()
	if err := pause(ctx, s.duration); err != nil {
		return nil, err
	}
	f := &idleFigures{idleSize: s}
	var again int
	f.device, f.most, f.opened = devices.since(beforeDevices)
	_, f.agent, again = agents.since(beforeAgents)
	f.opened += again
	n := int64(s.devices)
	f.device = total{f.device.sent / n, f.device.received / n, f.device.messages / n}
	if ok, how := b.serveAll(ctx); !ok {
		return nil, fmt.Errorf("not all devices serve at the end: %s", how)
	}
	return f, nil
}

// serveAll says whether the controller knows all devices, and the agents, to
// serve all models.
func (b *bench) serveAll(ctx context.Context) (bool, string) {
	client := dunlinv1connect.NewDeviceServiceClient(byhand.User(b.controller.Token, nil), b.controller.URL)
	r, err := client.ListDevices(ctx, connect.NewRequest(&dunlinv1.ListDevicesRequest{}))
	if err != nil {
		return false, err.Error()
	}
	n := 0
	for _, d := range r.Msg.GetDevices() {
		serving := 0
		for _, v := range d.GetReported().GetVersions() {
			if v.GetServing() {
				serving++
			}
		}
		if d.GetConnected() && serving == idleModels {
			n++
		}
	}
	return n == b.devices+len(b.controller.Agents), fmt.Sprintf("%d devices serve", n)
}
