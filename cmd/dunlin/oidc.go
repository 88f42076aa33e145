package main

import (
	"context"
	"crypto/rand"
	"crypto/subtle"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"time"

	"github.com/coreos/go-oidc/v3/oidc"
	"golang.org/x/oauth2"

	dunlinv1 "github.com/dunlin/dunlin/proto/dunlin/v1"
)

// signInTimeout bounds how long somebody may take to sign in.
const signInTimeout = 10 * time.Minute

// oidcLogin signs in at the OpenID Connect provider that the controller names,
// by the authorization code flow with PKCE over a redirect to this machine, and
// gives the ID token.
func (c *cli) oidcLogin(ctx context.Context, s settings) (string, error) {
	ctl, err := newClient(s)
	if err != nil {
		return "", err
	}
	methods, err := call(ctx, ctl.auth().GetLoginMethods, &dunlinv1.GetLoginMethodsRequest{})
	if err != nil {
		return "", fmt.Errorf("log in to %s: %w", s.URL, err)
	}
	if methods.GetOidcIssuer() == "" {
		return "", fmt.Errorf("%s has no OpenID Connect provider; use --user or a token", s.URL)
	}
	issuer := methods.GetOidcIssuer()
	token, err := c.signIn(oidc.ClientContext(ctx, &http.Client{Timeout: callTimeout}), issuer, methods.GetOidcClientId())
	if err != nil {
		return "", fmt.Errorf("sign in at %s: %w", plain(issuer), err)
	}
	return token, nil
}

func (c *cli) signIn(ctx context.Context, issuer, clientID string) (string, error) {
	ctx, cancel := context.WithTimeout(ctx, signInTimeout)
	defer cancel()
	if _, err := checkURL(issuer); err != nil {
		return "", err
	}
	provider, err := oidc.NewProvider(ctx, issuer)
	if err != nil {
		return "", err
	}
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return "", err
	}
	config := oauth2.Config{
		ClientID: clientID, Endpoint: provider.Endpoint(), RedirectURL: "http://" + listener.Addr().String() + "/callback",
		Scopes: []string{oidc.ScopeOpenID, "profile", "email"},
	}
	config.Endpoint.AuthStyle = oauth2.AuthStyleInParams // there is no secret
	state, nonce, verifier := rand.Text(), rand.Text(), oauth2.GenerateVerifier()
	fmt.Fprintf(c.err, "To sign in, open this page in a browser on this machine:\n\n%s\n\n",
		plain(config.AuthCodeURL(state, oidc.Nonce(nonce), oauth2.S256ChallengeOption(verifier))))
	code, err := waitForCode(ctx, listener, state)
	if err != nil {
		return "", err
	}
	tokens, err := config.Exchange(ctx, code, oauth2.VerifierOption(verifier))
	if err != nil {
		return "", err
	}
	raw, ok := tokens.Extra("id_token").(string)
	if !ok {
		return "", errors.New("it gives no ID token")
	}
	verified, err := provider.Verifier(&oidc.Config{ClientID: clientID}).Verify(ctx, raw)
	if err != nil {
		return "", err
	}
	if verified.Nonce != nonce {
		return "", errors.New("its token is of another sign-in")
	}
	return raw, nil
}

// waitForCode answers the browser that comes back from the provider, and gives
// the code that it brings along. What does not bring state is of somebody else.
func waitForCode(ctx context.Context, listener net.Listener, state string) (string, error) {
	type answer struct {
		code string
		err  error
	}
	answers := make(chan answer, 1)
	server := &http.Server{ReadHeaderTimeout: 10 * time.Second, Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		q := r.URL.Query()
		if r.URL.Path != "/callback" || subtle.ConstantTimeCompare([]byte(q.Get("state")), []byte(state)) != 1 {
			http.Error(w, "This is not the sign-in that dunlin waits for.", http.StatusBadRequest)
			return
		}
		a, text := answer{code: q.Get("code")}, "You may close this page: dunlin has what it needs."
		if a.code == "" {
			a.err = fmt.Errorf("it refuses: %s %s", plain(q.Get("error")), plain(q.Get("error_description")))
			text = "The sign-in was refused. You may close this page."
		}
		select {
		case answers <- a:
		default: // one has come
		}
		w.Header().Set("Content-Type", "text/plain; charset=utf-8")
		_, _ = io.WriteString(w, text+"\n")
	})}
	served := make(chan error, 1)
	go func() { served <- server.Serve(listener) }()
	defer func() {
		// The page may be on its way to the browser still.
		grace, cancel := context.WithTimeout(context.WithoutCancel(ctx), time.Second)
		defer cancel()
		_ = server.Shutdown(grace)
		_ = server.Close()
		<-served
	}()
	select {
	case a := <-answers:
		return a.code, a.err
	case <-ctx.Done():
		if errors.Is(ctx.Err(), context.DeadlineExceeded) {
			return "", fmt.Errorf("nobody signed in within %s", signInTimeout)
		}
		return "", ctx.Err()
	}
}
