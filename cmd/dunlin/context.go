package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"maps"
	neturl "net/url"
	"os"
	"regexp"
	"slices"
	"strings"

	"connectrpc.com/connect"
	"github.com/spf13/cobra"

	"github.com/dunlin/dunlin/internal/strictyaml"
	dunlinv1 "github.com/dunlin/dunlin/proto/dunlin/v1"
)

// contexts is the settings file: controllers and credentials by name.
type contexts struct {
	// Current is the one in use; "" where none was chosen.
	Current  string              `yaml:"current,omitempty"`
	Contexts map[string]settings `yaml:"contexts"`
}

var contextNames = regexp.MustCompile(`^[a-z0-9][a-z0-9._-]{0,62}$`)

func checkContextName(name string) error {
	if !contextNames.MatchString(name) {
		return usagef("context name %q is not of 1 to 63 lower-case letters, digits, '.', '_' and '-', with a letter or a digit first", name)
	}
	return nil
}

// parseContexts reads the settings file.
func parseContexts(b []byte) (*contexts, error) {
	// A file of an older version holds the settings of one controller.
	var f struct {
		Current  string              `yaml:"current"`
		Contexts map[string]settings `yaml:"contexts"`
		URL      string              `yaml:"url"`
		Token    string              `yaml:"token"`
		TokenID  string              `yaml:"token-id"`
		CA       string              `yaml:"ca"`
	}
	if err := strictyaml.Decode(b, &f); err != nil {
		return nil, err
	}
	all := &contexts{f.Current, f.Contexts}
	if old := (settings{f.URL, f.Token, f.TokenID, f.CA}); old != (settings{}) {
		if all.Current != "" || len(all.Contexts) > 0 {
			return nil, errors.New("it has url or token beside contexts")
		}
		name := hostName(old.URL)
		all.Current, all.Contexts = name, map[string]settings{name: old}
	}
	if all.Contexts == nil {
		all.Contexts = map[string]settings{}
	}
	if len(all.Contexts) > maxContexts {
		return nil, fmt.Errorf("it has %d contexts, allowed are %d", len(all.Contexts), maxContexts)
	}
	for name, s := range all.Contexts {
		if err := checkContextName(name); err != nil {
			return nil, err
		}
		if _, err := s.roots(); err != nil {
			return nil, err
		}
	}
	return all, nil
}

// readContexts gives what is stored, or none.
func readContexts() (*contexts, error) {
	path, err := settingsPath()
	if err != nil {
		return nil, err
	}
	b, err := readPrivate(path)
	if err != nil {
		return nil, err
	}
	all, err := parseContexts(b)
	if err != nil {
		// The file holds tokens: say where, not what.
		return nil, fmt.Errorf("read settings: %s is not valid; run: dunlin login URL", path)
	}
	return all, nil
}

// write stores the contexts, readable by their owner only. Without any there is
// no file.
func (all *contexts) write() error {
	path, err := settingsPath()
	if err != nil {
		return err
	}
	if len(all.Contexts) == 0 {
		if err := os.Remove(path); err != nil && !errors.Is(err, os.ErrNotExist) {
			return fmt.Errorf("delete settings: %w", err)
		}
		return nil
	}
	if len(all.Contexts) > maxContexts {
		return fmt.Errorf("write settings: there are %d contexts stored, allowed are %d\nrun: dunlin context delete NAME", len(all.Contexts)-1, maxContexts)
	}
	return writePrivate(path, all)
}

func (all *contexts) names() []string { return slices.Sorted(maps.Keys(all.Contexts)) }

// get gives the context of a name.
func (all *contexts) get(name string) (settings, error) {
	s, ok := all.Contexts[name]
	switch {
	case ok:
		return s, nil
	case len(all.Contexts) == 0:
		return s, fmt.Errorf("no context is called %q: none is stored\nrun: dunlin login URL --context %s", name, name)
	}
	return s, fmt.Errorf("no context is called %q, there are %s\nrun: dunlin context list", name, strings.Join(all.names(), ", "))
}

// contextName is what was chosen by --context or DUNLIN_CONTEXT, or "".
func (c *cli) contextName() string { return cmp.Or(c.context, os.Getenv("DUNLIN_CONTEXT")) }

// chosen gives the context in force.
func (c *cli) chosen(all *contexts) (name string, s settings, err error) {
	name = cmp.Or(c.contextName(), all.Current)
	if name == "" {
		err := errors.New("not logged in\nrun: dunlin login URL")
		if len(all.Contexts) > 0 {
			err = fmt.Errorf("no context is in use, there are %s\nrun: dunlin context use NAME", strings.Join(all.names(), ", "))
		}
		return "", settings{}, codeError{code: exitNotAllowed, err: err}
	}
	s, err = all.get(name)
	return name, s, err
}

// hostName makes a context's name of a controller's URL.
func hostName(url string) string {
	host := ""
	if u, err := neturl.Parse(url); err == nil {
		host = u.Host
	}
	name := strings.Map(func(r rune) rune {
		if r >= 'a' && r <= 'z' || r >= '0' && r <= '9' || r == '.' || r == '-' {
			return r
		}
		return '-'
	}, strings.ToLower(host))
	name = strings.Trim(name, "-.")
	return cmp.Or(strings.TrimRight(name[:min(len(name), 59)], "-."), "default")
}

// place says under which name a login at a URL is stored: the one that was
// chosen, else one that has this URL, the one in use first, else a new one.
func (c *cli) place(all *contexts, url string) string {
	if name := c.contextName(); name != "" {
		return name
	}
	for _, name := range append([]string{all.Current}, all.names()...) {
		if s, ok := all.Contexts[name]; ok && sameURL(s.URL, url) {
			return name
		}
	}
	base := hostName(url)
	name := base
	for i := 2; ; i++ {
		if _, taken := all.Contexts[name]; !taken {
			return name
		}
		name = fmt.Sprintf("%s-%d", base, i)
	}
}

// store keeps what a login gave, in use from now on, and gives its name. A
// settings file that cannot be read is put aside.
func (c *cli) store(s settings) (name string, err error) {
	all, err := readContexts()
	if err != nil {
		path, pathErr := settingsPath()
		if pathErr != nil {
			return "", pathErr
		}
		if err := os.Rename(path, path+".old"); err != nil {
			return "", fmt.Errorf("put the old settings aside: %w", err)
		}
		fmt.Fprintf(c.err, "The old settings could not be read; they are in %s.old now.\n", path)
		all = &contexts{Contexts: map[string]settings{}}
	}
	name = c.place(all, s.URL)
	all.Contexts[name], all.Current = s, name
	return name, all.write()
}

// forget deletes a context, and takes back a token that login made for it.
func (c *cli) forget(ctx context.Context, all *contexts, name string) error {
	s := all.Contexts[name]
	delete(all.Contexts, name)
	if all.Current == name {
		all.Current = ""
	}
	if err := all.write(); err != nil {
		return err
	}
	if s.TokenID == "" {
		return nil
	}
	ctl, err := newClient(s)
	if err == nil {
		_, err = call(ctx, ctl.users().DeleteToken, &dunlinv1.DeleteTokenRequest{Id: s.TokenID})
	}
	switch connect.CodeOf(err) {
	case connect.CodeUnauthenticated, connect.CodeNotFound: // it is gone already
		err = nil
	}
	if err != nil {
		fmt.Fprintf(c.err, "The token is good until it expires: %s cannot take it back: %s\n", s.URL, message(err))
	}
	return nil
}

func (c *cli) contextCommand() *cobra.Command {
	out := format("table")
	list := &cobra.Command{
		Use:   "list",
		Short: "Show the stored controllers",
		Args:  arguments(0, 0),
		RunE: func(*cobra.Command, []string) error {
			all, err := readContexts()
			if err != nil {
				return err
			}
			return c.showContexts(out, all, all.names())
		},
	}
	list.Flags().VarP(&out, "output", "o", "how to write it")
	show := &cobra.Command{
		Use:   "show [NAME]",
		Short: "Show the controller in use, or that of a name",
		Args:  arguments(0, 1),
		RunE: func(_ *cobra.Command, args []string) error {
			all, err := readContexts()
			if err != nil {
				return err
			}
			name := ""
			if len(args) == 1 {
				name = args[0]
				_, err = all.get(name)
			} else {
				name, _, err = c.chosen(all)
			}
			if err != nil {
				return err
			}
			return c.showContexts(out, all, []string{name})
		},
	}
	show.Flags().VarP(&out, "output", "o", "how to write it")
	use := &cobra.Command{
		Use:     "use NAME",
		Short:   "Talk to the controller of this name from now on",
		Example: "  dunlin context use berlin",
		Args:    arguments(1, 1),
		RunE: func(_ *cobra.Command, args []string) error {
			return c.changeContexts(func(all *contexts) error {
				s, err := all.get(args[0])
				if err != nil {
					return err
				}
				all.Current = args[0]
				fmt.Fprintf(c.err, "In use from now on: %s\n", s.URL)
				return nil
			}, "context/%s in use", args[0])
		},
	}
	rename := &cobra.Command{
		Use:   "rename NAME NEW",
		Short: "Give a stored controller another name",
		Args:  arguments(2, 2),
		RunE: func(_ *cobra.Command, args []string) error {
			if err := checkContextName(args[1]); err != nil {
				return err
			}
			return c.changeContexts(func(all *contexts) error {
				s, err := all.get(args[0])
				if err != nil {
					return err
				}
				if _, taken := all.Contexts[args[1]]; taken {
					return fmt.Errorf("a context is called %q already\nrun: dunlin context delete %s", args[1], args[1])
				}
				delete(all.Contexts, args[0])
				all.Contexts[args[1]] = s
				if all.Current == args[0] {
					all.Current = args[1]
				}
				return nil
			}, "context/%s renamed to %s", args[0], args[1])
		},
	}
	remove := &cobra.Command{
		Use:   "delete NAME",
		Short: "Forget a stored controller and its token",
		Long: `delete forgets a controller, as logout does: a token that "login --user" made is
taken back.`,
		Args: arguments(1, 1),
		RunE: func(cmd *cobra.Command, args []string) error {
			all, err := readContexts()
			if err != nil {
				return err
			}
			if _, err := all.get(args[0]); err != nil {
				return err
			}
			if err := c.forget(cmd.Context(), all, args[0]); err != nil {
				return err
			}
			fmt.Fprintf(c.out, "context/%s deleted\n", args[0])
			return nil
		},
	}
	g := group("context", "Choose among stored controllers", list, use, show, rename, remove)
	g.Long = `A context is a controller with the credentials for it, stored by "dunlin login"
under a name. Commands talk to that of --context, else that of DUNLIN_CONTEXT,
else the one in use. DUNLIN_URL, DUNLIN_TOKEN and DUNLIN_CA override the latter
two.`
	return g
}

// shownContext is what is shown of a context: no token.
type shownContext struct {
	Name      string `json:"name"`
	InUse     bool   `json:"inUse"`
	URL       string `json:"url"`
	Authority string `json:"authority"`
}

func (s shownContext) GetName() string { return s.Name }

func (c *cli) showContexts(f format, all *contexts, names []string) error {
	current := cmp.Or(c.contextName(), all.Current)
	shown := []any{}
	t := &table{header: []string{"NAME", "IN USE", "URL", "AUTHORITY"}}
	for _, name := range names {
		s := shownContext{name, name == current, all.Contexts[name].URL, "the system's"}
		if all.Contexts[name].CA != "" {
			s.Authority = "stored"
		}
		mark := ""
		if s.InUse {
			mark = "*"
		}
		t.add(s.Name, mark, s.URL, s.Authority)
		shown = append(shown, s)
	}
	return c.show(f, view{whole: map[string]any{"contexts": shown}, items: shown, table: func() *table { return t }})
}

// changeContexts stores the contexts changed, and says so.
func (c *cli) changeContexts(change func(*contexts) error, said string, args ...any) error {
	all, err := readContexts()
	if err != nil {
		return err
	}
	if err := change(all); err != nil {
		return err
	}
	if err := all.write(); err != nil {
		return err
	}
	fmt.Fprintf(c.out, said+"\n", args...)
	return nil
}
