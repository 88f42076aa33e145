package identitytest

import (
	"context"
	"crypto/tls"
	"errors"
	"log/slog"
	"sync"

	"connectrpc.com/connect"
	mochi "github.com/mochi-mqtt/server/v2"
	"github.com/mochi-mqtt/server/v2/listeners"
	"github.com/mochi-mqtt/server/v2/packets"
	"google.golang.org/protobuf/proto"

	"github.com/dunlin/dunlin/internal/link"
	dunlinv1 "github.com/dunlin/dunlin/proto/dunlin/v1"
)

// ServeMQTT answers strangers over a broker, whose URL it gives.
func (c *Controller) ServeMQTT() string {
	c.t.Helper()
	b := mochi.New(&mochi.Options{InlineClient: true, Logger: slog.New(slog.DiscardHandler)})
	tcp := listeners.NewTCP(listeners.Config{ID: "tcp", Address: "127.0.0.1:0", TLSConfig: c.TLS()})
	var answering sync.WaitGroup
	for _, err := range []error{
		b.AddHook(&strangers{c: c}, nil), b.AddListener(tcp),
		b.Subscribe(link.JoinUpFilter, 1, func(_ *mochi.Client, _ packets.Subscription, p packets.Packet) {
			user, nonce, err := link.ParseJoinUp(p.TopicName)
			q := new(dunlinv1.EnrolRequest)
			if err := errors.Join(err, proto.Unmarshal(p.Payload, q)); err != nil {
				c.t.Error(err)
				return
			}
			answering.Go(func() {
				raw, err := proto.Marshal(c.answerMQTT(q))
				if err := errors.Join(err, b.Publish(link.JoinDown(user, nonce), raw, false, 0)); err != nil {
					c.t.Error(err)
				}
			})
		}),
		b.Serve(),
	} {
		c.ok(err)
	}
	c.t.Cleanup(func() {
		answering.Wait()
		b.Close()
	})
	return "mqtts://" + tcp.Address()
}

func (c *Controller) answerMQTT(q *dunlinv1.EnrolRequest) *dunlinv1.EnrolResponse {
	ctx, a := context.Background(), new(dunlinv1.EnrolResponse)
	var err error
	switch {
	case q.GetJoin() != nil:
		var r *connect.Response[dunlinv1.JoinResponse]
		if r, err = c.Join(ctx, connect.NewRequest(q.GetJoin())); err == nil {
			a.Response = &dunlinv1.EnrolResponse_Join{Join: r.Msg}
		}
	case q.GetRenew() != nil:
		var r *connect.Response[dunlinv1.RenewResponse]
		if r, err = c.Renew(ctx, connect.NewRequest(q.GetRenew())); err == nil {
			a.Response = &dunlinv1.EnrolResponse_Renew{Renew: r.Msg}
		}
	default:
		var r *connect.Response[dunlinv1.GetTimeResponse]
		if r, err = c.GetTime(ctx, connect.NewRequest(q.GetTime())); err == nil {
			a.Response = &dunlinv1.EnrolResponse_Time{Time: r.Msg}
		}
	}
	if e, ok := errors.AsType[*connect.Error](err); ok {
		a.Response = &dunlinv1.EnrolResponse_Error{Error: &dunlinv1.EnrolError{Code: uint32(e.Code()), Message: e.Message()}}
	}
	return a
}

// strangers lets those in that have a join token or want to renew, each in its
// own conversation.
type strangers struct {
	mochi.HookBase
	c *Controller
}

func (s *strangers) ID() string { return "strangers" }
func (s *strangers) Provides(b byte) bool {
	return b == mochi.OnConnectAuthenticate || b == mochi.OnACLCheck
}

func (s *strangers) OnConnectAuthenticate(cl *mochi.Client, p packets.Packet) bool {
	user, password := string(p.Connect.Username), string(p.Connect.Password)
	known := user == link.TokenUser(s.c.Token) && password == s.c.Token || user == link.RenewUser && password == link.RenewUser
	return known && len(cl.Net.Conn.(*tls.Conn).ConnectionState().PeerCertificates) == 0
}

func (s *strangers) OnACLCheck(cl *mochi.Client, topic string, write bool) bool {
	parse := link.ParseJoinDown
	if write {
		parse = link.ParseJoinUp
	}
	user, _, err := parse(topic)
	return err == nil && user == string(cl.Properties.Username)
}
