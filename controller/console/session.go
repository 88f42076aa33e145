package console

import (
	"bytes"
	"context"
	"crypto/tls"
	"io"
	"net/http"
	"strings"
	"time"

	"connectrpc.com/connect"
	"google.golang.org/protobuf/types/known/durationpb"

	"github.com/dunlin/dunlin/controller/identity"
	v1 "github.com/dunlin/dunlin/proto/dunlin/v1"
	v1connect "github.com/dunlin/dunlin/proto/dunlin/v1/dunlinv1connect"
)

// The limits of sessions.
const (
	sessionFor = 12 * time.Hour
	maxForm    = 32 << 10 // bytes; a token of OpenID Connect has up to 16 KiB
)

// Names of cookies. A browser takes the first only over TLS, for this host only.
const (
	secureCookie = "__Host-dunlin_session"
	clearCookie  = "dunlin_session"
	themeCookie  = "dunlin_theme"
)

// session is who looks. The zero session is nobody.
type session struct {
	Who   identity.Principal
	id    string // of the token
	token string
	calls calls
}

// SessionCookie gives the cookie of a session: the id of a token, and the token.
func SessionCookie(id, token string, secure bool) *http.Cookie {
	c := &http.Cookie{Name: clearCookie, Value: id + "~" + token, Path: "/", HttpOnly: true, SameSite: http.SameSiteLaxMode, Secure: secure}
	if secure {
		c.Name = secureCookie
	}
	return c
}

func (s *console) sessionOf(r *http.Request) (in session) {
	name := clearCookie
	if r.TLS != nil {
		name = secureCookie
	}
	if c, err := r.Cookie(name); err == nil {
		in.id, in.token, _ = strings.Cut(c.Value, "~")
	}
	in.calls = s.as(r, in.token)
	return in
}

// signedIn gives a page to who has signed in; others are led to do so.
func (s *console) signedIn(h func(http.ResponseWriter, *http.Request, session)) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		in := s.sessionOf(r)
		err := in.who(r.Context())
		switch {
		case err == nil:
			h(w, r, in)
		case connect.CodeOf(err) != connect.CodeUnauthenticated:
			s.failed(w, r, session{}, err)
		case strings.Contains(r.Header.Get("Accept"), "text/html") && r.Header.Get("HX-Request") == "":
			s.forget(w, r)
			to := "/sign-in"
			if at := r.URL.RequestURI(); at != "/" {
				to += "?next=" + escape(at)
			}
			http.Redirect(w, r, to, http.StatusSeeOther)
		default:
			w.Header().Set("HX-Redirect", "/sign-in")
			http.Error(w, "sign in first", http.StatusUnauthorized)
		}
	}
}

// who asks whose session it is, and whether they may look.
func (in *session) who(ctx context.Context) error {
	if in.token == "" {
		return connect.NewError(connect.CodeUnauthenticated, identity.ErrUnauthenticated)
	}
	resp, err := in.calls.auth().WhoAmI(ctx, connect.NewRequest(&v1.WhoAmIRequest{}))
	if err != nil {
		return err
	}
	m := resp.Msg
	in.Who = identity.Principal{Kind: identity.User, Name: m.GetName(), Role: identity.Role(m.GetRole()), Scope: m.GetScope()}
	if err := identity.Allow(in.Who, identity.ConsolePages); err != nil {
		return connect.NewError(connect.CodePermissionDenied, err)
	}
	return nil
}

type signInForm struct {
	Name, Next, Fault string
	Token             bool // the form for tokens is open
	OIDC              string
}

func (s *console) signInPage(w http.ResponseWriter, r *http.Request) {
	s.writeSignIn(w, r, http.StatusOK, signInForm{Next: localPath(r.URL.Query().Get("next"))})
}

func (s *console) writeSignIn(w http.ResponseWriter, r *http.Request, status int, f signInForm) {
	methods, err := s.as(r, "").auth().GetLoginMethods(r.Context(), connect.NewRequest(&v1.GetLoginMethodsRequest{}))
	if err != nil {
		s.failed(w, r, session{}, err)
		return
	}
	f.OIDC = methods.Msg.GetOidcIssuer()
	s.pages.write(w, r, status, "signin", page{Title: "Sign in", Data: f, Now: s.Now()})
}

// signIn makes a session, by name and password or by a token. A token itself is
// not kept: the session has one of its own, that is good for less.
func (s *console) signIn(w http.ResponseWriter, r *http.Request) {
	r.Body = http.MaxBytesReader(w, r.Body, maxForm)
	if err := r.ParseForm(); err != nil {
		s.fail(w, r, session{}, http.StatusBadRequest, "The form cannot be read: it may have up to 32 KiB.")
		return
	}
	f := signInForm{Name: r.PostForm.Get("name"), Next: localPath(r.PostForm.Get("next")), Token: r.PostForm.Has("token")}
	var id, token string
	var until time.Time
	var err error
	if f.Token {
		id, token, until, err = byToken(r.Context(), s.as(r, strings.TrimSpace(r.PostForm.Get("token"))))
	} else {
		var resp *connect.Response[v1.LoginResponse]
		resp, err = s.as(r, "").auth().Login(r.Context(), connect.NewRequest(&v1.LoginRequest{Name: f.Name, Password: r.PostForm.Get("password")}))
		if err == nil {
			id, token, until = resp.Msg.GetId(), resp.Msg.GetToken(), resp.Msg.GetExpiresAt().AsTime()
		}
	}
	switch code := connect.CodeOf(err); {
	case err == nil:
	case code == connect.CodeUnauthenticated && f.Token:
		f.Fault = "This token is not valid: it is wrong, has expired or was taken back."
	case code == connect.CodeUnauthenticated:
		f.Fault = "Name or password is wrong."
	default:
		f.Fault = messageOf(err)
	}
	if err != nil {
		s.writeSignIn(w, r, statusOf(err), f)
		return
	}
	c := SessionCookie(id, token, r.TLS != nil)
	c.Expires = until
	http.SetCookie(w, c)
	http.Redirect(w, r, f.Next, http.StatusSeeOther)
}

// byToken makes the token of a session for who shows another one.
func byToken(ctx context.Context, c calls) (id, token string, until time.Time, err error) {
	who, err := c.auth().WhoAmI(ctx, connect.NewRequest(&v1.WhoAmIRequest{}))
	if err != nil {
		return "", "", until, err
	}
	req := &v1.CreateTokenRequest{Comment: "console", ValidFor: durationpb.New(sessionFor)}
	if end := who.Msg.GetExpiresAt(); end != nil && time.Until(end.AsTime()) <= sessionFor {
		req.ValidFor = nil // it ends as the one that is shown does
	}
	made, err := c.users().CreateToken(ctx, connect.NewRequest(req))
	if err != nil {
		return "", "", until, err
	}
	return made.Msg.GetInfo().GetId(), made.Msg.GetToken(), made.Msg.GetInfo().GetExpiresAt().AsTime(), nil
}

// signOut takes the session's token back.
func (s *console) signOut(w http.ResponseWriter, r *http.Request) {
	in := s.sessionOf(r)
	if in.token != "" {
		_, err := in.calls.users().DeleteToken(r.Context(), connect.NewRequest(&v1.DeleteTokenRequest{Id: in.id}))
		if code := connect.CodeOf(err); err != nil && code != connect.CodeUnauthenticated && code != connect.CodeNotFound {
			s.failed(w, r, in, err)
			return
		}
	}
	s.forget(w, r)
	http.Redirect(w, r, "/sign-in", http.StatusSeeOther)
}

func (s *console) forget(w http.ResponseWriter, r *http.Request) {
	c := SessionCookie("", "", r.TLS != nil)
	c.MaxAge = -1
	http.SetCookie(w, c)
}

var themes = map[string]bool{"light": true, "dark": true}

// themeOf gives the theme that the viewer chose; "": the system's.
func themeOf(r *http.Request) string {
	if c, err := r.Cookie(themeCookie); err == nil && themes[c.Value] {
		return c.Value
	}
	return ""
}

func (s *console) setTheme(w http.ResponseWriter, r *http.Request) {
	r.Body = http.MaxBytesReader(w, r.Body, maxForm)
	theme := r.PostFormValue("theme")
	c := &http.Cookie{Name: themeCookie, Value: theme, Path: "/", MaxAge: int((365 * 24 * time.Hour).Seconds()), HttpOnly: true, SameSite: http.SameSiteLaxMode, Secure: r.TLS != nil}
	if !themes[theme] {
		c.Value, c.MaxAge = "", -1
	}
	http.SetCookie(w, c)
	http.Redirect(w, r, localPath(r.PostFormValue("next")), http.StatusSeeOther)
}

// calls are the API's services for one caller.
type calls struct {
	handler http.Handler
	token   string
	from    string
	host    string
	secure  bool
}

func (s *console) as(r *http.Request, token string) calls {
	return calls{s.API, token, r.RemoteAddr, r.Host, r.TLS != nil}
}

func (c calls) auth() v1connect.AuthServiceClient {
	return v1connect.NewAuthServiceClient(c, c.base(), asIs)
}

func (c calls) users() v1connect.UserServiceClient {
	return v1connect.NewUserServiceClient(c, c.base(), asIs)
}

func (c calls) devices() v1connect.DeviceServiceClient {
	return v1connect.NewDeviceServiceClient(c, c.base(), asIs)
}

// asIs has answers come uncompressed: they do not leave the process.
var asIs = connect.WithAcceptCompression("gzip", nil, nil)

func (c calls) base() string { return "http://" + c.host }

// Do has the API answer a request as if the caller had sent it, from where the
// caller is, so that the guard against guessing counts it there.
func (c calls) Do(req *http.Request) (*http.Response, error) {
	r := req.Clone(req.Context())
	r.RequestURI, r.RemoteAddr, r.Host = req.URL.RequestURI(), c.from, c.host
	if c.secure { // without the browser's certificate, which is no user's
		r.TLS = &tls.ConnectionState{Version: tls.VersionTLS13, HandshakeComplete: true}
	}
	r.Header.Del("Authorization")
	if c.token != "" {
		r.Header.Set("Authorization", "Bearer "+c.token)
	}
	if r.Body == nil {
		r.Body = http.NoBody
	}
	a := &answer{header: http.Header{}}
	c.handler.ServeHTTP(a, r)
	a.WriteHeader(http.StatusOK)
	return &http.Response{
		Status: http.StatusText(a.status), StatusCode: a.status, Proto: "HTTP/1.1", ProtoMajor: 1, ProtoMinor: 1,
		Header: a.sent, Body: io.NopCloser(&a.body), ContentLength: int64(a.body.Len()), Request: req,
	}, nil
}

// answer keeps what a handler writes.
type answer struct {
	header, sent http.Header
	status       int
	body         bytes.Buffer
}

func (a *answer) Header() http.Header { return a.header }

func (a *answer) WriteHeader(status int) {
	if a.status == 0 {
		a.status, a.sent = status, a.header.Clone()
	}
}

func (a *answer) Write(b []byte) (int, error) {
	a.WriteHeader(http.StatusOK)
	return a.body.Write(b)
}
