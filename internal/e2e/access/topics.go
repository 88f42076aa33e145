package access

import (
	"bufio"
	"context"
	"crypto/rand"
	"crypto/tls"
	"errors"
	"fmt"
	"net/http"
	"strconv"
	"strings"
	"sync"
	"time"

	"google.golang.org/protobuf/proto"

	"github.com/dunlin/dunlin/internal/e2e/byhand"
	"github.com/dunlin/dunlin/internal/link"
	dunlinv1 "github.com/dunlin/dunlin/proto/dunlin/v1"
)

// topic is one kind of topic, or filter, for a client: a device, or one that
// enrols as a user.
type topic struct {
	what   string
	topic  func(device, other, user string) string
	filter bool // nobody publishes on it
}

// topics are the kinds that the table in docs/access.md has too.
var topics = func() []topic {
	var all []topic
	add := func(what string, f func(device, other, user string) string) {
		all = append(all, topic{what: what, topic: f})
	}
	filter := func(what string, f func(device, other, user string) string) {
		all = append(all, topic{what: what, topic: f, filter: true})
	}
	constant := func(s string) func(_, _, _ string) string { return func(_, _, _ string) string { return s } }
	for _, kind := range []string{link.Hello, link.Reported, link.Events, link.Telemetry, link.Request, link.Sources, link.Fetch, link.Gone} {
		add("its own up/"+kind, func(d, _, _ string) string { return link.Up(d, kind) })
		add("another device's up/"+kind, func(_, o, _ string) string { return link.Up(o, kind) })
	}
	for _, kind := range []string{link.Desired, link.Command, link.Block} {
		add("its own down/"+kind, func(d, _, _ string) string { return link.Down(d, kind) })
		add("another device's down/"+kind, func(_, o, _ string) string { return link.Down(o, kind) })
	}
	add("its own up topic of no kind", func(d, _, _ string) string { return link.Up(d, "nothing") })
	add("its own up topic in another shard", func(d, _, _ string) string {
		return "dunlin/v1/" + strconv.Itoa(int(link.Shard(d)+1)%link.Shards) + "/" + d + "/up/" + link.Events
	})
	add("controller/epoch", constant(link.EpochTopic))
	add("its own join/USER/NONCE/up", func(_, _, u string) string { return link.JoinUp(u, nonce) })
	add("its own join/USER/NONCE/down", func(_, _, u string) string { return link.JoinDown(u, nonce) })
	add("another user's join/USER/NONCE/up", func(_, _, u string) string { return link.JoinUp(anotherUser(u), nonce) })
	add("another user's join/USER/NONCE/down", func(_, _, u string) string { return link.JoinDown(anotherUser(u), nonce) })
	add("a topic outside of dunlin/v1", constant("other/topic"))

	filter("all of its own down topics, by +", func(d, _, _ string) string { return link.Down(d, "+") })
	filter("all of its own down topics, by #", func(d, _, _ string) string { return link.Down(d, "#") })
	filter("all of another device's down topics", func(_, o, _ string) string { return link.Down(o, "#") })
	filter("all down topics", constant("dunlin/v1/+/+/down/+"))
	filter("all up topics", constant(link.UpFilter))
	filter("all answers to its own user", func(_, _, u string) string { return link.JoinDown(u, "+") })
	filter("all answers to all users", constant("dunlin/v1/join/+/+/down"))
	filter("all requests of all users", constant(link.JoinUpFilter))
	filter("everything, by #", constant("#"))
	filter("everything of dunlin/v1, by #", constant("dunlin/v1/#"))
	filter("$SYS/#", constant("$SYS/#"))
	filter("another device's down topics, shared", func(_, o, _ string) string { return "$share/group/" + link.Down(o, "+") })
	return all
}()

// anotherUser is link.RenewUser, or another than that.
func anotherUser(user string) string {
	if user == link.RenewUser {
		return link.JoinUser("0123456789ab")
	}
	return link.RenewUser
}

// client is one identity at the broker.
type client struct {
	name    string
	address string
	login   byhand.Login
	secure  *tls.Config
	device  string // "": it enrols
	other   string // the other device
	enters  bool
}

func (c *client) mayPublish(topic string) bool {
	if c.device != "" {
		return link.DeviceMayPublish(c.device, topic)
	}
	return link.EnrollingMayPublish(c.login.User, topic)
}

func (c *client) maySubscribe(filter string) bool {
	if c.device != "" {
		return link.DeviceMaySubscribe(c.device, filter)
	}
	return link.EnrollingMaySubscribe(c.login.User, filter)
}

// clients are all identities: those that may come in, and those that may not.
func (w *world) clients() []*client {
	of := func(name string, d, other *byhand.Device) *client {
		return &client{name: name, address: w.MQTT, login: byhand.Login{ClientID: d.Name}, secure: d.TLS(host), device: d.Name, other: other.Name, enters: true}
	}
	stranger := func(name string, own *tls.Certificate, id string) *client {
		return &client{name: name, address: w.MQTT, login: byhand.Login{ClientID: id}, secure: byhand.TLS(w.roots, own, host)}
	}
	enrolling := func(name, user, password string, enters bool) *client {
		return &client{name: name, address: w.EnrolMQTT, login: byhand.Login{ClientID: name, User: user, Password: password}, secure: byhand.TLS(w.roots, nil, host),
			other: w.other.Name, enters: enters}
	}
	return []*client{
		of("device", w.device, w.other), of("other device", w.other, w.device),
		enrolling("join-token-holder", w.user(), w.joinToken, true),
		enrolling("renew-user", link.RenewUser, link.RenewUser, true),

		enrolling("join-token-of-another", link.JoinUser("0123456789ab"), w.joinToken, false),
		enrolling("wrong-join-token", w.user(), w.joinToken[1:], false),
		enrolling("renew-user-wrong-password", link.RenewUser, "guess", false),
		enrolling("viewers-token", "viewer", w.viewerToken, false),
		enrolling("administrators-token", w.user(), w.Token, false),
		enrolling("name-of-a-device", w.device.Name, w.device.Name, false),
		enrolling("nobody-where-others-enrol", "", "", false),
		stranger("nobody", nil, w.device.Name),
		stranger("revoked device", w.revoked.Certificate(), w.revoked.Name),
		stranger("expired certificate", w.stale, w.device.Name),
		stranger("certificate of another authority", w.foreign, w.device.Name),
	}
}

// watcher is somebody to whom messages could come that are not for it.
type watcher struct {
	*client
	*byhand.Conn
}

// watch watches what becomes of the messages of one client.
type watch struct {
	*world
	outbox   string
	watchers []watcher // the other device, and the users that enrol
	may      int       // messages that should have had an effect

	mu       sync.Mutex // guards what follows
	marked   int        // messages with the mark that came to somebody
	answered map[string]int
	sent     map[string]uint64 // events, by device
	acked    map[string]uint64
}

// mark begins what is published. No decoder takes it.
const mark = "\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff mark"

// settle bounds the wait for what must come.
const settle = 10 * time.Second

// take is told of every message that comes to somebody whose it is.
func (v *watch) take(topic string, payload []byte) {
	v.mu.Lock()
	defer v.mu.Unlock()
	if strings.HasPrefix(string(payload), mark) {
		v.marked++
	}
	answer, command := &dunlinv1.EnrolResponse{}, &dunlinv1.Command{}
	if user, _, err := link.ParseJoinDown(topic); err == nil && proto.Unmarshal(payload, answer) == nil {
		if answer.GetTime() != nil {
			v.answered[user]++
		} else { // to the mark
			v.marked++
		}
	}
	if device, kind, err := link.ParseDown(topic); err == nil && kind == link.Command && proto.Unmarshal(payload, command) == nil {
		v.acked[device] = max(v.acked[device], command.GetEventAck().GetSequence())
	}
}

// topics tries who may connect, publish and subscribe.
func (w *world) topics(ctx context.Context) (r Result, err error) {
	for _, c := range w.clients() {
		conn, err := byhand.Connect(ctx, c.address, c.secure, c.login, nil)
		detail := "connected"
		if err != nil {
			detail = err.Error()
		} else {
			conn.Close()
		}
		if ctx.Err() != nil {
			return r, ctx.Err()
		}
		r.cell(c.name, "connect to the broker", err == nil, c.enters, detail)
		if err == nil != c.enters || !c.enters {
			continue
		}
		v := &watch{world: w, outbox: rand.Text(), answered: map[string]int{}, sent: map[string]uint64{}, acked: map[string]uint64{}}
		err = v.tryAll(ctx, c, &r)
		for _, w := range v.watchers {
			w.Close()
		}
		if err != nil {
			return r, fmt.Errorf("%s at the broker: %w", c.name, err)
		}
	}
	return r, nil
}

func (v *watch) tryAll(ctx context.Context, c *client, r *Result) error {
	// Those that what c publishes could come to, beside the controller.
	for _, o := range v.clients() {
		if !o.enters || o.name == c.name {
			continue
		}
		conn, err := byhand.Connect(ctx, o.address, o.secure, o.login, v.take)
		if err != nil {
			return fmt.Errorf("%s watches: %w", o.name, err)
		}
		v.watchers = append(v.watchers, watcher{o, conn})
		filters := []string{link.JoinDown(o.login.User, nonce)}
		if o.device != "" {
			filters = []string{link.Down(o.device, link.Desired), link.Down(o.device, link.Command), link.Down(o.device, link.Block), link.EpochTopic}
		}
		for _, f := range filters {
			if ok, err := conn.Subscribe(f); err != nil || !ok {
				return fmt.Errorf("%s watches %s: granted %t, %w", o.name, f, ok, err)
			}
		}
	}
	user := c.login.User
	if c.device != "" {
		user = v.user() // it is none itself
	}
	before, err := v.effects(ctx)
	if err != nil {
		return err
	}
	for _, t := range topics {
		topic := t.topic(c.device, c.other, user)
		if c.device == "" {
			topic = t.topic(c.other, c.other, user)
			if strings.HasPrefix(t.what, "its own") && !strings.Contains(t.what, "join/") || strings.HasPrefix(t.what, "all of its own") {
				continue // it is no device
			}
		}
		if !t.filter {
			allowed, err := v.publish(ctx, c, topic)
			if err != nil {
				return fmt.Errorf("publish on %s: %w", topic, err)
			}
			r.cell(c.name, "publish on "+t.what, allowed, c.mayPublish(topic), topic)
		}
		allowed, detail, err := v.subscribe(ctx, c, topic)
		if err != nil {
			return fmt.Errorf("subscribe to %s: %w", topic, err)
		}
		r.cell(c.name, "subscribe to "+t.what, allowed, c.maySubscribe(topic), topic+": "+detail)
	}
	after, err := v.effects(ctx)
	r.cell(c.name, "all together", after-before > v.may, false, fmt.Sprintf("%d messages had an effect, %d may", after-before, v.may))
	return err
}

// publish publishes something and says whether it had an effect: the
// controller took it, or it came to somebody. By then everybody has published
// something else, of which the effect was waited for.
func (v *watch) publish(ctx context.Context, c *client, topic string) (bool, error) {
	before, err := v.effects(ctx)
	if err != nil {
		return false, err
	}
	// It may listen to what it may, too.
	conn, err := v.connect(ctx, c)
	if err != nil {
		return false, err
	}
	defer func() { conn.Close() }()
	if err := conn.Publish(topic, []byte(mark)); err == nil {
		err = conn.Ping()
		if err != nil && !errors.Is(err, byhand.ErrEnded) {
			return false, err
		}
	}
	select {
	case <-conn.Done(): // the broker has ended it for that
		conn.Close()
		if conn, err = v.connect(ctx, c); err != nil {
			return false, err
		}
	default:
	}
	for _, w := range append([]watcher{{c, conn}}, v.watchers...) {
		if err := v.proof(ctx, w); err != nil {
			return false, err
		}
	}
	want := before
	if c.mayPublish(topic) {
		want++
		v.may++
	}
	had, err := v.until(ctx, want)
	return had > before, err
}

func (v *watch) connect(ctx context.Context, c *client) (*byhand.Conn, error) {
	conn, err := byhand.Connect(ctx, c.address, c.secure, c.login, v.take)
	if err != nil {
		return nil, err
	}
	filter := link.JoinDown(c.login.User, nonce)
	if c.device != "" {
		filter = link.Down(c.device, "+")
	}
	if ok, err := conn.Subscribe(filter); err != nil || !ok {
		conn.Close()
		return nil, fmt.Errorf("subscribe to %s: granted %t, %w", filter, ok, err)
	}
	return conn, nil
}

// until waits for so many effects, and gives how many there are.
func (v *watch) until(ctx context.Context, want int) (int, error) {
	deadline := time.Now().Add(settle)
	for {
		n, err := v.effects(ctx)
		if err != nil || n >= want || time.Now().After(deadline) {
			return n, err
		}
		select {
		case <-ctx.Done():
			return n, ctx.Err()
		case <-time.After(2 * time.Millisecond):
		}
	}
}

// effects counts the messages with the mark that the controller has taken as a
// device's, or has answered, and those that came to somebody.
func (v *watch) effects(ctx context.Context) (n int, err error) {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, v.URL+"/metrics", nil)
	if err != nil {
		return 0, err
	}
	resp, err := v.admin.Do(req)
	if err != nil {
		return 0, err
	}
	defer resp.Body.Close()
	lines := bufio.NewScanner(resp.Body)
	for lines.Scan() {
		name, value, _ := strings.Cut(lines.Text(), " ")
		// What it has of a topic that is nobody's it drops.
		if !strings.HasPrefix(name, "dunlin_controller_malformed_total{") || strings.Contains(name, `kind="topic"`) {
			continue
		}
		f, err := strconv.ParseFloat(value, 64)
		if err != nil {
			return 0, err
		}
		n += int(f)
	}
	if err := lines.Err(); err != nil {
		return 0, err
	}
	v.mu.Lock()
	defer v.mu.Unlock()
	return n + v.marked, nil
}

// subscribe says whether a subscription brings anything that its client may
// not have; or, of one that it may have, whether it is granted and brings what
// it should. A broker may grant one of which nothing comes.
func (v *watch) subscribe(ctx context.Context, c *client, filter string) (allowed bool, detail string, err error) {
	var mu sync.Mutex
	var got []string
	conn, err := byhand.Connect(ctx, c.address, c.secure, c.login, func(topic string, payload []byte) {
		mu.Lock()
		got = append(got, topic)
		mu.Unlock()
		if c.device == "" || strings.HasPrefix(topic, link.Down(c.device, "")) {
			v.take(topic, payload)
		}
	})
	if err != nil {
		return false, "", err
	}
	defer func() { conn.Close() }()
	granted, err := conn.Subscribe(filter)
	if err != nil && !errors.Is(err, byhand.ErrEnded) {
		return false, "", err
	}
	if err != nil {
		return false, "the broker ends the connection", nil
	}
	for _, w := range v.watchers {
		if err := v.proof(ctx, w); err != nil {
			return false, "", err
		}
	}
	if _, err := v.ask(watcher{c, conn}); err != nil { // what is its own
		return false, "", err
	}
	own := link.JoinDown(c.login.User, nonce)
	if c.device != "" {
		own = link.Down(c.device, link.Command)
	}
	brings := c.maySubscribe(filter) && (filter == own || strings.TrimRight(filter, "#+") == link.Down(c.device, ""))
	deadline := time.Now().Add(settle)
	for {
		if err := conn.Ping(); err != nil {
			if errors.Is(err, byhand.ErrEnded) {
				return false, "the broker ends the connection", nil
			}
			return false, "", err
		}
		mu.Lock()
		have := append([]string(nil), got...)
		mu.Unlock()
		came := false
		for _, topic := range have {
			if !c.maySubscribe(topic) {
				return true, "came: " + topic, nil
			}
			came = came || topic == own
		}
		switch {
		case !c.maySubscribe(filter):
			return false, fmt.Sprintf("granted %t", granted), nil
		case !granted:
			return false, "not granted", nil
		case !brings || came:
			return true, "granted", nil
		case time.Now().After(deadline):
			return false, "granted, and nothing came", nil
		}
	}
}

// proof has somebody send what it may, and waits for what it may have for it.
func (v *watch) proof(ctx context.Context, w watcher) error {
	came, err := v.ask(w)
	if err == nil {
		err = v.await(ctx, came)
	}
	if err != nil {
		return fmt.Errorf("what %s may have does not come: %w", w.name, err)
	}
	return nil
}

// ask sends an event of a device, which the controller acknowledges, or the
// question of somebody who enrols what time it is. came says whether there is
// an answer; it is asked with mu held.
func (v *watch) ask(w watcher) (came func() bool, err error) {
	var m proto.Message
	var topic string
	v.mu.Lock()
	if w.device != "" {
		v.sent[w.device]++
		n := v.sent[w.device]
		topic = link.Up(w.device, link.Events)
		m = &dunlinv1.EventBatch{OutboxId: v.outbox, Events: []*dunlinv1.Event{{Sequence: n, Kind: "access.tried", Severity: dunlinv1.Severity_SEVERITY_INFO}}}
		came = func() bool { return v.acked[w.device] >= n }
	} else {
		user := w.login.User
		before := v.answered[user]
		topic = link.JoinUp(user, nonce)
		m = &dunlinv1.EnrolRequest{Request: &dunlinv1.EnrolRequest_Time{Time: &dunlinv1.GetTimeRequest{Nonce: []byte(nonce)}}}
		came = func() bool { return v.answered[user] > before }
	}
	v.mu.Unlock()
	b, err := proto.Marshal(m)
	if err != nil {
		return nil, err
	}
	return came, w.Publish(topic, b)
}

// await waits until something is so, which it asks with mu held.
func (v *watch) await(ctx context.Context, is func() bool) error {
	deadline := time.Now().Add(settle)
	for {
		v.mu.Lock()
		ok := is()
		v.mu.Unlock()
		switch {
		case ok:
			return nil
		case time.Now().After(deadline):
			return fmt.Errorf("not within %s", settle)
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(time.Millisecond):
		}
	}
}
