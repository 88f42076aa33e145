package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"

	"github.com/spf13/cobra"
	"golang.org/x/term"

	dunlinv1 "github.com/dunlin/dunlin/proto/dunlin/v1"
)

// maxToken bounds what is read as a token.
const maxToken = 512

func (c *cli) loginCommand() *cobra.Command {
	var tokenFile string
	cmd := &cobra.Command{
		Use:   "login URL",
		Short: "Store the controller's URL and a token for it",
		Long: `login asks the controller at URL who the token belongs to and, if it is good,
stores both in the user's folder of settings (dunlin/config.yaml, mode 0600).

The token comes from --token-file, from standard input where that is not a
terminal, or from a prompt. On its first start a controller writes the first
token to the file admin-token in its data folder.`,
		Example: "  dunlin login http://127.0.0.1:8080 --token-file data/admin-token",
		Args:    arguments(1, 1),
		RunE: func(cmd *cobra.Command, args []string) error {
			return c.login(cmd.Context(), args[0], tokenFile)
		},
	}
	cmd.Flags().StringVar(&tokenFile, "token-file", "", "file that holds the token")
	return cmd
}

func (c *cli) login(ctx context.Context, url, tokenFile string) error {
	url, err := checkURL(url)
	if err != nil {
		return err
	}
	token, err := c.readToken(ctx, tokenFile)
	if err != nil {
		return err
	}
	s := settings{URL: url, Token: token}
	who, err := call(ctx, newClient(s).auth().WhoAmI, &dunlinv1.WhoAmIRequest{})
	if err != nil {
		if exitCode(err) == exitNotAllowed {
			return codeError{code: exitNotAllowed, err: fmt.Errorf("%s refuses the token; nothing was stored", url)}
		}
		return fmt.Errorf("log in to %s: %w", url, err)
	}
	if err := s.write(); err != nil {
		return err
	}
	fmt.Fprintf(c.err, "Logged in to %s as %s (%s); the controller is version %s.\n", url, who.GetName(), who.GetRole(), who.GetControllerVersion())
	return nil
}

func (c *cli) readToken(ctx context.Context, path string) (string, error) {
	var b []byte
	var err error
	if f, ok := c.in.(*os.File); path == "" && ok && term.IsTerminal(int(f.Fd())) {
		b, err = c.promptToken(ctx, f)
	} else {
		in := c.in
		if path != "" {
			f, err := os.Open(path)
			if err != nil {
				return "", fmt.Errorf("read token: %w", err)
			}
			defer f.Close()
			in = f
		}
		b, err = io.ReadAll(io.LimitReader(in, maxToken+2))
	}
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

// promptToken reads without showing what is typed. An interrupt puts the
// terminal back.
func (c *cli) promptToken(ctx context.Context, f *os.File) ([]byte, error) {
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
	fmt.Fprint(c.err, "Token: ")
	b, err := term.ReadPassword(int(f.Fd()))
	fmt.Fprintln(c.err)
	return b, err
}
