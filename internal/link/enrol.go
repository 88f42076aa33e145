package link

import (
	"context"
	"crypto/rand"
	"crypto/tls"
	"errors"
	"fmt"
	"net"
	"net/url"
	"time"

	mqtt "github.com/eclipse/paho.mqtt.golang"
	"github.com/eclipse/paho.mqtt.golang/packets"
	"google.golang.org/protobuf/proto"

	dunlinv1 "github.com/dunlin/dunlin/proto/dunlin/v1"
)

// ErrStranger is the error of a broker that does not let a device without a
// valid certificate in, by the user name and password that it has.
var ErrStranger = errors.New("the broker does not know the join token, or lets no device in that has no certificate")

// Enrolment says how a device without a valid certificate connects.
type Enrolment struct {
	BrokerURL      string // "mqtts://host:port"
	User, Password string // TokenUser and the token, or RenewUser twice
	TLS            func() *tls.Config
	// Dial opens the connection below TLS; nil: TCP.
	Dial func(ctx context.Context, network, address string) (net.Conn, error)
}

// Enrol asks the controller once, over the broker, and gives its answer, which
// may be an EnrolError. Where the controller does not hear it there is no
// answer: ctx should have an end.
func Enrol(ctx context.Context, cfg Enrolment, request *dunlinv1.EnrolRequest) (*dunlinv1.EnrolResponse, error) {
	at, err := parseBroker(cfg.BrokerURL)
	if err != nil {
		return nil, err
	}
	payload, err := proto.Marshal(request)
	if err != nil {
		return nil, err
	}
	if len(payload) > MaxPayload {
		return nil, fmt.Errorf("%w: %d bytes, allowed are %d", ErrTooLarge, len(payload), MaxPayload)
	}
	if cfg.Dial == nil {
		cfg.Dial = new(net.Dialer).DialContext
	}
	conn, secure, err := dial(ctx, cfg.Dial, at.address, cfg.TLS(), connectTimeout)
	if err != nil {
		return nil, fmt.Errorf("connect: %w", err)
	}
	defer conn.Close()
	defer context.AfterFunc(ctx, func() { conn.Close() })()
	nonce := rand.Text()
	down := JoinDown(cfg.User, nonce)
	answers, lost := make(chan []byte, 1), make(chan error, 1)
	client := mqtt.NewClient(mqtt.NewClientOptions().AddBroker(at.url).
		SetClientID(nonce).SetUsername(cfg.User).SetPassword(cfg.Password).
		SetProtocolVersion(4).SetCleanSession(true).SetOrderMatters(true).
		SetAutoReconnect(false).SetConnectRetry(false).
		SetConnectTimeout(connectTimeout).SetWriteTimeout(writeTimeout).
		SetDefaultPublishHandler(func(_ mqtt.Client, m mqtt.Message) {
			if m.Topic() != down {
				return
			}
			select {
			case answers <- m.Payload():
			default: // one answer is enough
			}
		}).
		SetConnectionLostHandler(func(_ mqtt.Client, err error) { lost <- err }).
		SetCustomOpenConnectionFn(func(*url.URL, mqtt.ClientOptions) (net.Conn, error) { return &boundedConn{Conn: secure}, nil }))
	wait := func(t mqtt.Token) error {
		select {
		case <-t.Done():
			return t.Error()
		case err := <-lost:
			return err
		case <-ctx.Done():
			return ctx.Err()
		}
	}
	connect := client.Connect()
	<-connect.Done() // at the end of ctx the connection is closed
	if err := connect.Error(); err != nil {
		if errors.Is(err, packets.ErrorRefusedBadUsernameOrPassword) || errors.Is(err, packets.ErrorRefusedNotAuthorised) {
			return nil, ErrStranger
		}
		return nil, errors.Join(ctx.Err(), fmt.Errorf("connect: %w", err))
	}
	defer client.Disconnect(uint(goodbyeTimeout / time.Millisecond))
	subscribe := client.Subscribe(down, 0, nil).(*mqtt.SubscribeToken)
	if err := wait(subscribe); err != nil {
		return nil, fmt.Errorf("subscribe: %w", err)
	}
	if subscribe.Result()[down] > 2 {
		return nil, fmt.Errorf("%w: %s", errSubscription, down)
	}
	if err := wait(client.Publish(JoinUp(cfg.User, nonce), 0, false, payload)); err != nil {
		return nil, fmt.Errorf("publish: %w", err)
	}
	select {
	case payload = <-answers:
	case err := <-lost:
		return nil, fmt.Errorf("connection lost: %w", err)
	case <-ctx.Done():
		return nil, fmt.Errorf("the controller does not answer over the broker: %w", ctx.Err())
	}
	answer := new(dunlinv1.EnrolResponse)
	if err := proto.Unmarshal(payload, answer); err != nil {
		return nil, fmt.Errorf("the answer: %w: %w", errMalformed, err)
	}
	return answer, nil
}
