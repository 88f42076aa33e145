package main

import (
	"bytes"
	"cmp"
	"context"
	"crypto/tls"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"net"
	neturl "net/url"
	"os"
	"strings"

	"connectrpc.com/connect"
	"github.com/spf13/cobra"
	"golang.org/x/term"

	"github.com/dunlin/dunlin/internal/pki"
	dunlinv1 "github.com/dunlin/dunlin/proto/dunlin/v1"
)

// The most that is read as a token, of Dunlin's or of OpenID Connect, and as a
// password.
const (
	maxToken    = 16 << 10
	maxPassword = 2 << 10
)

// loginFlags say how to sign in, and by what the controller is known.
type loginFlags struct {
	user, tokenFile, ca, fingerprint string
	oidc                             bool
}

func (c *cli) loginCommand() *cobra.Command {
	var f loginFlags
	cmd := &cobra.Command{
		Use:   "login URL",
		Short: "Sign in to a controller and store a token for it",
		Long: `login asks the controller at URL who is calling and, if it knows, stores the URL
and the token in the user's folder of settings (dunlin/config.yaml, mode 0600), as
a context: that of --context or DUNLIN_CONTEXT, else the one that has this URL,
else a new one that has the host's name. It is then the one in use; the others
stay, see "dunlin context".

The token comes from --token-file, from standard input where that is not a
terminal, or from a prompt. With --user the controller makes one for a name and
a password, which comes from standard input or a prompt; with --oidc it is that
of the OpenID Connect provider which the controller names. On its first start a
controller writes the first token to the file admin-token in its data folder.

A controller that has a certificate of its own certificate authority is known by
--ca, a PEM file, or by --ca-fingerprint, the SHA-256 of the authority's public
key. What is given is stored, and every later command goes by it.`,
		Example: `  dunlin login http://127.0.0.1:8080 --token-file data/admin-token
  dunlin login https://dunlin.example.com --user ada
  dunlin login https://10.0.0.5:8443 --oidc --ca ca.pem`,
		Args: arguments(1, 1),
		RunE: func(cmd *cobra.Command, args []string) error {
			if err := cmp.Or(exclusive(cmd, "token-file", "user", "oidc"), exclusive(cmd, "ca", "ca-fingerprint")); err != nil {
				return err
			}
			return c.login(cmd.Context(), args[0], f)
		},
	}
	cmd.Flags().StringVar(&f.tokenFile, "token-file", "", "file that holds the token")
	cmd.Flags().StringVar(&f.user, "user", "", "sign in by the name and password of this user")
	cmd.Flags().BoolVar(&f.oidc, "oidc", false, "sign in by OpenID Connect, in a browser")
	cmd.Flags().StringVar(&f.ca, "ca", "", "PEM file with the certificate authority of the controller")
	cmd.Flags().StringVar(&f.fingerprint, "ca-fingerprint", "", "SHA-256 of the public key of that authority, hexadecimal")
	return cmd
}

func (c *cli) login(ctx context.Context, url string, f loginFlags) error {
	url, err := checkURL(url)
	if err != nil {
		return err
	}
	s := settings{URL: url}
	if s.CA, err = c.authorities(ctx, url, f); err != nil {
		return fmt.Errorf("log in to %s: %w", url, err)
	}
	switch {
	case f.user != "":
		err = c.passwordLogin(ctx, &s, f.user)
	case f.oidc:
		s.Token, err = c.oidcLogin(ctx, s)
	default:
		s.Token, err = c.readToken(ctx, f.tokenFile)
	}
	if err != nil {
		return err
	}
	ctl, err := newClient(s)
	if err != nil {
		return err
	}
	who, err := call(ctx, ctl.auth().WhoAmI, &dunlinv1.WhoAmIRequest{})
	if err != nil {
		if exitCode(err) == exitNotAllowed {
			why := err.Error()
			if e, ok := errors.AsType[*connect.Error](err); ok {
				why = e.Message()
			}
			return codeError{code: exitNotAllowed, err: fmt.Errorf("%s refuses the token; nothing was stored: %s", url, plain(why))}
		}
		return fmt.Errorf("log in to %s: %w", url, err)
	}
	name, err := c.store(s)
	if err != nil {
		return err
	}
	fmt.Fprintf(c.err, "Logged in to %s as %s; the controller is version %s.\n", url, plain(callerText(who)), plain(who.GetControllerVersion()))
	fmt.Fprintf(c.err, "The context in use is %s.\n", name)
	if until := dateText(who.GetExpiresAt()); until != "" {
		fmt.Fprintf(c.err, "The token is good until %s.\n", until)
	}
	return nil
}

// callerText writes "ada (operator of site=berlin)".
func callerText(who *dunlinv1.WhoAmIResponse) string {
	role := who.GetRole()
	if scope := labelsText(who.GetScope()); scope != "" {
		role += " of " + scope
	}
	return who.GetName() + " (" + role + ")"
}

// authorities gives, as PEM, the certificate authorities of the controller that
// the flags name, else the environment, else what was stored for it before.
func (c *cli) authorities(ctx context.Context, url string, f loginFlags) (string, error) {
	if f.ca+f.fingerprint != "" && !strings.HasPrefix(url, "https:") {
		return "", usagef("--ca and --ca-fingerprint are for https://")
	}
	if path := cmp.Or(f.ca, os.Getenv("DUNLIN_CA")); path != "" && f.fingerprint == "" {
		return readCA(path)
	}
	if f.fingerprint != "" {
		return fetchCA(ctx, url, f.fingerprint)
	}
	all, err := readContexts()
	if err != nil {
		return "", nil // a file that cannot be read is written anew
	}
	if stored := all.Contexts[c.place(all, url)]; sameURL(stored.URL, url) {
		return stored.CA, nil
	}
	return "", nil
}

// fetchCA gets the certificate authority of a controller from itself, and
// believes it by its fingerprint.
func fetchCA(ctx context.Context, url, fingerprint string) (string, error) {
	b, err := hex.DecodeString(strings.ReplaceAll(fingerprint, ":", ""))
	if err != nil || len(b) != len(pki.Pin{}) {
		return "", usagef("--ca-fingerprint %q is not the %d hexadecimal digits of a SHA-256", fingerprint, 2*len(pki.Pin{}))
	}
	pin := pki.Pin(b)
	u, err := neturl.Parse(url)
	if err != nil {
		return "", err
	}
	ctx, cancel := context.WithTimeout(ctx, callTimeout)
	defer cancel()
	d := tls.Dialer{Config: pki.ClientConfig(pki.Client{Trust: func() pki.Trust { return pki.Trust{Pin: &pin} }}, u.Hostname())}
	conn, err := d.DialContext(ctx, "tcp", net.JoinHostPort(u.Hostname(), cmp.Or(u.Port(), "443")))
	if err != nil {
		return "", fmt.Errorf("by --ca-fingerprint: %w", err)
	}
	defer conn.Close()
	for _, cert := range conn.(*tls.Conn).ConnectionState().PeerCertificates {
		if pki.PinOf(cert) == pin {
			return string(pki.EncodeCertificates(cert)), nil
		}
	}
	return "", errors.New("the server does not show the authority of --ca-fingerprint")
}

// passwordLogin has the controller make a token for a name and a password.
func (c *cli) passwordLogin(ctx context.Context, s *settings, user string) error {
	password, err := c.readPassword(ctx, "Password: ")
	if err != nil {
		return err
	}
	ctl, err := newClient(*s)
	if err != nil {
		return err
	}
	res, err := call(ctx, ctl.auth().Login, &dunlinv1.LoginRequest{Name: user, Password: password})
	if connect.CodeOf(err) == connect.CodeUnauthenticated {
		return codeError{code: exitNotAllowed, err: fmt.Errorf("%s refuses the name or the password; nothing was stored", s.URL)}
	}
	if err != nil {
		return fmt.Errorf("log in to %s: %w", s.URL, err)
	}
	s.Token, s.TokenID = res.GetToken(), res.GetId()
	return nil
}

// readSecret reads from a file, or from standard input, or asks for it.
func (c *cli) readSecret(ctx context.Context, path, prompt string, most int) ([]byte, error) {
	if f, ok := c.in.(*os.File); path == "" && ok && term.IsTerminal(int(f.Fd())) {
		return c.prompt(ctx, f, prompt)
	}
	in := c.in
	if path != "" {
		f, err := os.Open(path)
		if err != nil {
			return nil, err
		}
		defer f.Close()
		in = f
	}
	return io.ReadAll(io.LimitReader(in, int64(most)+3))
}

func (c *cli) readToken(ctx context.Context, path string) (string, error) {
	b, err := c.readSecret(ctx, path, "Token: ", maxToken)
	if err != nil {
		return "", fmt.Errorf("read token: %w", err)
	}
	token := string(bytes.TrimSpace(b))
	switch {
	case token == "":
		return "", errors.New("no token given: use --token-file, standard input, or the prompt")
	case len(token) > maxToken || strings.ContainsAny(token, " \t\r\n"):
		return "", fmt.Errorf("what was given is not a token: it has spaces or more than %d characters", maxToken)
	}
	return token, nil
}

// readPassword reads one line.
func (c *cli) readPassword(ctx context.Context, prompt string) (string, error) {
	b, err := c.readSecret(ctx, "", prompt, maxPassword)
	if err != nil {
		return "", fmt.Errorf("read password: %w", err)
	}
	password := strings.TrimSuffix(strings.TrimSuffix(string(b), "\n"), "\r")
	switch {
	case password == "":
		return "", errors.New("no password given: use standard input, or the prompt")
	case len(password) > maxPassword || strings.ContainsAny(password, "\r\n"):
		return "", fmt.Errorf("what was given is not a password: it has several lines or more than %d bytes", maxPassword)
	}
	return password, nil
}

// newPassword reads one that is chosen now: at a terminal, where it is not
// shown, twice.
func (c *cli) newPassword(ctx context.Context, prompt string) (string, error) {
	password, err := c.readPassword(ctx, prompt)
	if f, ok := c.in.(*os.File); err != nil || !ok || !term.IsTerminal(int(f.Fd())) {
		return password, err
	}
	again, err := c.readPassword(ctx, "Once more: ")
	if err == nil && again != password {
		err = errors.New("the two passwords differ")
	}
	return password, err
}

// prompt reads without showing what is typed. An interrupt puts the terminal
// back.
func (c *cli) prompt(ctx context.Context, f *os.File, text string) ([]byte, error) {
	if c.noInput {
		return nil, usagef("--no-input: give it on standard input, or a token with --token-file")
	}
	before, err := term.GetState(int(f.Fd()))
	if err != nil {
		return nil, err
	}
	stop := context.AfterFunc(ctx, func() {
		term.Restore(int(f.Fd()), before)
		fmt.Fprintln(c.err)
		os.Exit(exitError) // the read cannot be woken
	})
	defer stop()
	fmt.Fprint(c.err, text)
	b, err := term.ReadPassword(int(f.Fd()))
	fmt.Fprintln(c.err)
	return b, err
}

func (c *cli) logoutCommand() *cobra.Command {
	return &cobra.Command{
		Use:   "logout",
		Short: "Forget the stored token",
		Long: `logout deletes the context in use, or that of --context. A token that "login --user" made is taken back;
any other stays good for whoever has it.`,
		Args: arguments(0, 0),
		RunE: func(cmd *cobra.Command, _ []string) error { return c.logout(cmd.Context()) },
	}
}

func (c *cli) logout(ctx context.Context) error {
	all, err := readContexts()
	if err != nil { // nothing in it can be taken back
		path, pathErr := settingsPath()
		if pathErr != nil {
			return pathErr
		}
		if removeErr := os.Remove(path); removeErr != nil {
			return err
		}
		fmt.Fprintln(c.err, "Logged out.")
		return nil
	}
	name, _, err := c.chosen(all)
	if err != nil && (c.contextName() != "" || len(all.Contexts) > 0) {
		return err
	}
	if name == "" {
		fmt.Fprintln(c.err, "Not logged in.")
		return nil
	}
	if err := c.forget(ctx, all, name); err != nil {
		return err
	}
	fmt.Fprintln(c.err, "Logged out.")
	if len(all.Contexts) > 0 {
		fmt.Fprintf(c.err, "Still stored: %s\nrun: dunlin context use NAME\n", strings.Join(all.names(), ", "))
	}
	return nil
}

func (c *cli) whoamiCommand() *cobra.Command {
	out := format("table")
	cmd := &cobra.Command{
		Use:   "whoami",
		Short: "Show as whom the controller knows you, and what you may do",
		Args:  arguments(0, 0),
		RunE: func(cmd *cobra.Command, _ []string) error {
			ctl, err := c.client()
			if err != nil {
				return err
			}
			who, err := call(cmd.Context(), ctl.auth().WhoAmI, &dunlinv1.WhoAmIRequest{})
			if err != nil {
				return fmt.Errorf("ask %s: %w", ctl.URL, err)
			}
			return c.print(out, who, func() *table {
				t := &table{header: []string{"NAME", "ROLE", "SCOPE", "EXPIRES", "CONTROLLER"}}
				t.add(who.GetName(), who.GetRole(), labelsText(who.GetScope()), dateText(who.GetExpiresAt()), ctl.URL)
				return t
			})
		},
	}
	cmd.Flags().VarP(&out, "output", "o", "how to write it")
	return cmd
}
