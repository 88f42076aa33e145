package link

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"net"
	"net/url"
	"sync"
	"time"

	mqtt "github.com/eclipse/paho.mqtt.golang"

	dunlinv1 "github.com/dunlin/dunlin/proto/dunlin/v1"
)

const (
	// dataQueue bounds the answers that wait to be taken from a DataLine. On a
	// connection of its own nothing more is read then; on one that it shares
	// with a session, more are dropped, and asked for again.
	dataQueue = 2 * MaxWanted
	// howTimeout bounds the wait for the answer how to fetch.
	howTimeout = 10 * time.Second
)

// DataLine carries what a device fetches over MQTT: by a second connection,
// where the broker lets it have one, else by that of the session. Its methods
// may be called concurrently.
type DataLine struct {
	device  string
	answers chan *dunlinv1.FetchData
	session *session // the shared one; nil: a connection of its own
	client  mqtt.Client
	conn    net.Conn
	release func()

	once  sync.Once
	ended chan struct{} // closed when the line ended; cause says why
	cause error
}

// OpenData opens a line to fetch by. There must be a session, which says how;
// the error is ErrNotConnected without one. The device has one line at a time.
func (l *Link) OpenData(ctx context.Context) (*DataLine, error) {
	l.mu.Lock()
	s := l.session
	l.mu.Unlock()
	if s == nil {
		return nil, fmt.Errorf("fetch: %w", ErrNotConnected)
	}
	d := &DataLine{device: l.cfg.Device, session: s, answers: make(chan *dunlinv1.FetchData, dataQueue), ended: make(chan struct{})}
	if err := l.share(d); err != nil {
		return nil, err
	}
	second, err := d.how(ctx)
	if err != nil || !second {
		if err != nil {
			d.Close()
			return nil, err
		}
		return d, nil
	}
	d.Close()
	return l.openSecond(ctx)
}

// share has the answers that come by the session go to d.
func (l *Link) share(d *DataLine) error {
	s, topic := d.session, Down(l.cfg.Device, Data)
	l.mu.Lock()
	busy := l.data != nil
	if !busy {
		l.data = d
	}
	l.mu.Unlock()
	if busy {
		return errors.New("fetch: another line is open")
	}
	d.release = func() {
		l.mu.Lock()
		l.data = nil
		l.mu.Unlock()
		select {
		case <-s.ended:
		default:
			s.client.Unsubscribe(topic) // what still comes is dropped
		}
	}
	go func() { // ends with the line, or with the session before it
		select {
		case <-s.ended:
			d.end(s.cause)
		case <-d.ended:
		}
	}()
	if err := s.subscribeTo(map[string]byte{topic: 0}, connectTimeout); err != nil {
		d.Close()
		return fmt.Errorf("subscribe: %w", err)
	}
	return nil
}

// how asks whether the device may have a second connection.
func (d *DataLine) how(ctx context.Context) (second bool, err error) {
	ctx, cancel := context.WithTimeout(ctx, howTimeout)
	defer cancel()
	if err := d.Ask(&dunlinv1.FetchRequest{}); err != nil {
		return false, err
	}
	for {
		select {
		case a := <-d.answers:
			if a.Id == 0 {
				return a.SecondConnection, nil
			}
		case <-d.ended:
			return false, d.cause
		case <-ctx.Done():
			return false, fmt.Errorf("the controller does not answer how to fetch over MQTT: %w", ctx.Err())
		}
	}
}

// openSecond opens a connection for fetching only.
func (l *Link) openSecond(ctx context.Context) (*DataLine, error) {
	at, device := l.at(), l.cfg.Device
	conn, secure, err := dial(ctx, l.cfg.Dial, at.address, l.cfg.TLS(), connectTimeout)
	if err != nil {
		return nil, refusal(fmt.Errorf("connect: %w", err))
	}
	stop := context.AfterFunc(ctx, func() { conn.Close() })
	defer stop()
	d := &DataLine{device: device, conn: conn, release: func() {}, answers: make(chan *dunlinv1.FetchData, dataQueue), ended: make(chan struct{})}
	d.client = mqtt.NewClient(mqtt.NewClientOptions().AddBroker(at.url).
		SetClientID(DataClient(device)).SetUsername(device).
		SetProtocolVersion(4).SetCleanSession(true).SetOrderMatters(true).
		SetAutoReconnect(false).SetConnectRetry(false).
		SetKeepAlive(l.cfg.KeepAlive).SetConnectTimeout(connectTimeout).SetWriteTimeout(writeTimeout).
		SetDefaultPublishHandler(func(_ mqtt.Client, m mqtt.Message) {
			a, err := decode(device, m.Topic(), m.Payload())
			data, ok := a.(*dunlinv1.FetchData)
			if err != nil || !ok {
				l.malformed.Add(1)
				return
			}
			select {
			case d.answers <- data:
			case <-d.ended:
			}
		}).
		SetConnectionLostHandler(func(_ mqtt.Client, err error) { d.end(err) }).
		SetCustomOpenConnectionFn(func(*url.URL, mqtt.ClientOptions) (net.Conn, error) { return &boundedConn{Conn: secure}, nil }))
	connect := d.client.Connect()
	<-connect.Done()
	if err := connect.Error(); err != nil {
		conn.Close()
		return nil, refusal(fmt.Errorf("connect: %w", err))
	}
	if err := subscribe(d.client, d.ended, &d.cause, map[string]byte{Down(device, Data): 0}, connectTimeout); err != nil {
		d.Close()
		return nil, fmt.Errorf("subscribe: %w", err)
	}
	return d, nil
}

// Shared says that the line's messages go by the session's connection, where
// they must leave room for the others.
func (d *DataLine) Shared() bool { return d.session != nil }

// Ask sends a request. No error is no promise that it arrives.
func (d *DataLine) Ask(m *dunlinv1.FetchRequest) error {
	payload, err := encode(Fetch, m)
	if err != nil {
		return err
	}
	if d.session != nil {
		if !d.session.enqueue(message{Up(d.device, Fetch), payload, false}) {
			return fmt.Errorf("send %s: %w", Fetch, ErrNotConnected)
		}
		return nil
	}
	token := d.client.Publish(Up(d.device, Fetch), 0, false, payload)
	select {
	case <-token.Done():
		return token.Error()
	case <-d.ended:
		return d.cause
	}
}

// Answers gives the answers. The channel is never closed.
func (d *DataLine) Answers() <-chan *dunlinv1.FetchData { return d.answers }

// Done is closed when the line has ended; Err says why.
func (d *DataLine) Done() <-chan struct{} { return d.ended }

// Err says why the line has ended, once Done is closed.
func (d *DataLine) Err() error { return d.cause }

func (d *DataLine) end(cause error) {
	d.once.Do(func() {
		d.cause = cause
		close(d.ended)
		if d.session != nil {
			d.release()
		}
	})
}

// Close ends the line.
func (d *DataLine) Close() {
	d.end(net.ErrClosed)
	if d.client != nil {
		d.client.Disconnect(uint(goodbyeTimeout / time.Millisecond))
		d.conn.Close()
	}
}

func checkData(m *dunlinv1.FetchData) error {
	if len(m.Data) > MaxBlock {
		return fmt.Errorf("data has %d bytes, allowed are %d", len(m.Data), MaxBlock)
	}
	if len(m.Data) > 0 && m.Error != "" {
		return fmt.Errorf("data and the error %.80q", m.Error)
	}
	return nil
}

// CheckFetch says what is wrong with a request.
func CheckFetch(m *dunlinv1.FetchRequest) error {
	if n := len(m.GetWanted()); n > MaxWanted/8 {
		return fmt.Errorf("wanted has %d bytes, allowed are %d", n, MaxWanted/8)
	}
	if len(m.GetWanted()) == 0 {
		return nil // it asks how to ask
	}
	if n := len(m.GetSha256()); n != sha256.Size {
		return fmt.Errorf("sha256 has %d bytes, not %d", n, sha256.Size)
	}
	if b := m.GetBlockBytes(); b < MinFetchBlock || b > MaxBlock {
		return fmt.Errorf("block_bytes is %d, allowed are %d to %d", b, MinFetchBlock, MaxBlock)
	}
	if m.GetFirst() > maxFirst {
		return fmt.Errorf("first is %d, allowed are 0 to %d", m.GetFirst(), uint64(maxFirst))
	}
	return nil
}

// maxFirst keeps the offset of a block within 63 bits.
const maxFirst = 1 << 40
