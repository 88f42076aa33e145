// Package program is what every Dunlin program does before its own work: read
// its settings, refuse addresses that need TLS, lock its data folder, and
// know its version.
package program

import (
	"cmp"
	"errors"
	"flag"
	"fmt"
	"io"
	"net"
	"net/netip"
	"net/url"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/dunlin/dunlin/internal/strictyaml"
)

// Setting is one setting. Its name is that of its flag and of its YAML key;
// its environment variable is the name in capitals, with _ for -, behind the
// program's prefix.
type Setting struct {
	Name, Usage string
	Value       any    // *string, *bool or *int; holds the default
	Environment string // a further environment variable, weaker than the one by name
	// Secret: @FILE, which Load reads, stands for the text. A command line,
	// which everybody on the machine can read, must not hold the text itself,
	// nor a YAML file that others can read. Only for a *string of "".
	Secret bool
}

// given is a setting as a flag: it keeps what the command line says until
// the weaker sources have been read.
type given struct {
	setting *Setting
	text    string
	set     bool
}

func (g *given) String() string {
	if g.setting == nil { // the flag package looks at a zero value
		return ""
	}
	switch v := g.setting.Value.(type) {
	case *bool:
		return "" // a default of false is nothing to print
	case *int:
		return strconv.Itoa(*v)
	default:
		return *v.(*string)
	}
}

func (g *given) Set(text string) error {
	g.text, g.set = text, true
	return new(Setting{Value: g.setting.blank()}).parse(text)
}

// IsBoolFlag makes --name enough for a bool.
func (g *given) IsBoolFlag() bool {
	_, ok := g.setting.Value.(*bool)
	return ok
}

func (s *Setting) blank() any {
	switch s.Value.(type) {
	case *bool:
		return new(bool)
	case *int:
		return new(int)
	default:
		return new(string)
	}
}

// parse gives the setting the value that a text says.
func (s *Setting) parse(text string) error {
	switch v := s.Value.(type) {
	case *bool:
		b, err := strconv.ParseBool(text)
		if err != nil {
			return fmt.Errorf("%q is not true or false", text)
		}
		*v = b
	case *int:
		n, err := strconv.Atoi(text)
		if err != nil {
			return fmt.Errorf("%q is not a whole number", text)
		}
		*v = n
	default:
		*v.(*string) = text
	}
	return nil
}

// resolve reads the file that a secret names.
func (s *Setting) resolve(onLine bool, variable string) error {
	text := s.Value.(*string)
	path, isFile := strings.CutPrefix(*text, "@")
	switch {
	case isFile:
		f, err := os.Open(path)
		if err != nil {
			return err
		}
		defer f.Close()
		raw, err := io.ReadAll(io.LimitReader(f, maxSecret+1))
		if err != nil {
			return err
		}
		if len(raw) > maxSecret {
			return fmt.Errorf("%s has more than the %d bytes that are allowed", path, maxSecret)
		}
		*text = strings.TrimSpace(string(raw))
	case onLine && *text != "":
		*text = ""
		return fmt.Errorf("everybody on this machine can read command lines: give --%s @FILE, or set %s", s.Name, variable)
	}
	return nil
}

// checkFileSecrets says whether a configuration file may hold the secrets that
// were just read from it.
func checkFileSecrets(path string, settings []Setting) error {
	for _, s := range settings {
		if !s.Secret || *s.Value.(*string) == "" || strings.HasPrefix(*s.Value.(*string), "@") {
			continue
		}
		info, err := os.Stat(path)
		if err != nil {
			return fmt.Errorf("config: %w", err)
		}
		if mode := info.Mode().Perm(); mode&0o077 != 0 {
			return fmt.Errorf("config: %s holds %s and others can read it, its mode is %#o: run chmod 600 %[1]s, or give %[2]s as @FILE there", path, s.Name, mode)
		}
	}
	return nil
}

// maxSecret bounds the file of a secret; a larger one is refused.
const maxSecret = 64 << 10

// maxFile bounds a configuration file; a larger one is refused.
const maxFile = 1 << 20

// ErrUsage is the error of a command line or of settings that are wrong; a
// program that gets it exits with 2.
var ErrUsage = errors.New("wrong usage")

// Source is where a program's settings come from.
type Source struct {
	Program  string // with its verb: "dunlin-agent run"
	Synopsis string // of the arguments, where there may be any
	Notes    string // printed in the help above the flags
	Prefix   string // of its environment variables
	Args     []string
	Getenv   func(string) string
	Help     io.Writer // where help goes when it is asked for
	// Arguments takes what are not flags; nil: there may be nothing.
	Arguments func([]string) error
	// File, where not nil, is told the path of the YAML file; "": there is none.
	File *string
}

// Load gives the settings their values: their defaults, overridden by a YAML
// file, the environment and the flags, in this order. The file is named by
// --config or the environment variable <prefix>CONFIG and is read strictly
// into file, a pointer to the struct that holds the settings; more, where it
// is not nil, adds flags that are no settings. The error is flag.ErrHelp where
// help was asked for, and otherwise an ErrUsage that holds every fault.
func (s Source) Load(settings []Setting, file any, more func(*flag.FlagSet)) error {
	flags := flag.NewFlagSet(s.Program, flag.ContinueOnError)
	flags.SetOutput(io.Discard) // an error is said once, by the caller
	path := flags.String("config", s.Getenv(s.Prefix+"CONFIG"), "YAML `file` with the names of these flags as keys")
	line := make([]given, len(settings))
	for i := range settings {
		line[i].setting = &settings[i]
		flags.Var(&line[i], settings[i].Name, settings[i].Usage)
	}
	if more != nil {
		more(flags)
	}
	var arguments []string
	for rest := s.Args; ; rest = flags.Args()[1:] { // flags may follow arguments
		if err := flags.Parse(rest); errors.Is(err, flag.ErrHelp) {
			return errors.Join(err, s.printHelp(flags))
		} else if err != nil {
			return fmt.Errorf("%w: %w\nrun: %s --help", ErrUsage, err, s.Program)
		}
		if flags.NArg() == 0 {
			break
		}
		arguments = append(arguments, flags.Arg(0))
	}
	var faults []error
	if s.Arguments != nil {
		faults = append(faults, s.Arguments(arguments))
	} else if len(arguments) > 0 {
		faults = append(faults, fmt.Errorf("unexpected argument %q", arguments[0]))
	}
	if s.File != nil {
		*s.File = *path
	}
	if *path != "" {
		if err := readFile(*path, file); err != nil {
			faults = append(faults, fmt.Errorf("config: %w", err))
		}
		faults = append(faults, checkFileSecrets(*path, settings))
	}
	for i, one := range settings {
		variables := []string{s.Prefix + strings.ToUpper(strings.ReplaceAll(one.Name, "-", "_"))}
		if one.Environment != "" {
			variables = append(variables, one.Environment)
		}
		if n := slices.IndexFunc(variables, func(v string) bool { return s.Getenv(v) != "" }); n >= 0 {
			if err := one.parse(s.Getenv(variables[n])); err != nil {
				faults = append(faults, fmt.Errorf("%s: %w", variables[n], err))
			}
		}
		if line[i].set {
			faults = append(faults, one.parse(line[i].text))
		}
		if one.Secret {
			// No fault may show the text.
			if err := one.resolve(line[i].set, variables[len(variables)-1]); err != nil {
				faults = append(faults, fmt.Errorf("%s: %w", one.Name, err))
			}
		}
	}
	if err := errors.Join(faults...); err != nil {
		return fmt.Errorf("%w: %w", ErrUsage, err)
	}
	return nil
}

// printHelp lists the flags as they are written in the documents.
func (s Source) printHelp(flags *flag.FlagSet) error {
	var b strings.Builder
	usage := s.Program + " [flags]"
	if s.Synopsis != "" {
		usage += " " + s.Synopsis
	}
	fmt.Fprintf(&b, "Usage: %s\n\n%s\n\n", usage, s.Notes)
	flags.VisitAll(func(f *flag.Flag) {
		value, usage := flag.UnquoteUsage(f)
		dashes := "--"
		if len(f.Name) == 1 {
			dashes = "-"
		}
		if f.DefValue != "" {
			usage += " (default " + f.DefValue + ")"
		}
		fmt.Fprintf(&b, "  %-32s %s\n", dashes+f.Name+" "+value, usage)
	})
	_, err := io.WriteString(s.Help, b.String())
	return err
}

func readFile(path string, into any) error {
	f, err := os.Open(path)
	if err != nil {
		return err
	}
	defer f.Close()
	raw, err := io.ReadAll(io.LimitReader(f, maxFile+1))
	if err != nil {
		return err
	}
	if len(raw) > maxFile {
		return fmt.Errorf("%s has more than the %d bytes that are allowed", path, maxFile)
	}
	if err := strictyaml.Decode(raw, into); err != nil {
		return fmt.Errorf("%s: %w", path, err)
	}
	return nil
}

var (
	errNotLoopback = errors.New("is not on loopback: other addresses need TLS; or use 127.0.0.1")
	errNeedsTLS    = errors.New("is not on loopback: other addresses need --tls-cert and --tls-key; or use 127.0.0.1")
)

// CheckAddress says whether host:port is on loopback, where no other machine
// can listen in or connect.
func CheckAddress(address string) error { return checkAddress(address, errNotLoopback) }

// CheckListen says whether a listener may have the address host:port, which
// must be on loopback where it does not speak TLS.
func CheckListen(address string, tls bool) error {
	if tls {
		return checkAddress(address, nil)
	}
	return checkAddress(address, errNeedsTLS)
}

// checkAddress gives remote as the error of an address off loopback.
func checkAddress(address string, remote error) error {
	host, port, err := net.SplitHostPort(address)
	if err != nil || port == "" {
		return fmt.Errorf("%q is not host:port", address)
	}
	if _, err := net.LookupPort("tcp", port); err != nil {
		return fmt.Errorf("%q: %w", address, err)
	}
	if !Loopback(host) && remote != nil {
		return fmt.Errorf("%q %w", address, remote)
	}
	return nil
}

// Loopback says whether a host, by name or address, is this machine's own
// loopback interface. No name but localhost is looked up.
func Loopback(host string) bool {
	if host == "localhost" {
		return true
	}
	ip, err := netip.ParseAddr(host)
	return err == nil && ip.IsLoopback()
}

// CheckURL says whether a URL is <scheme>://host[:port], with one of the
// schemes, and on loopback where that scheme is not over TLS. Only http and
// https have a usual port.
func CheckURL(s string, schemes ...string) error {
	u, err := url.Parse(s)
	if err != nil {
		return fmt.Errorf("%q is not a URL", s) // the error could show a password
	}
	if !slices.Contains(schemes, u.Scheme) || u.Hostname() == "" || u.User != nil || u.RawQuery != "" || u.Fragment != "" {
		return fmt.Errorf("%q is not %s://host:port", u.Redacted(), strings.Join(schemes, ":// or "))
	}
	port := cmp.Or(u.Port(), map[string]string{"http": "80", "https": "443"}[u.Scheme])
	remote := errNotLoopback
	if u.Scheme == "https" || u.Scheme == "mqtts" {
		remote = nil
	}
	return checkAddress(net.JoinHostPort(u.Hostname(), port), remote)
}

// LockFolder keeps every other process away from a data folder. Closing what
// it gives, or the end of the process, opens the folder again.
func LockFolder(dir string) (io.Closer, error) {
	f, err := os.OpenFile(filepath.Join(dir, "lock"), os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return nil, fmt.Errorf("lock data folder: %w", err)
	}
	if err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		if errors.Is(err, unix.EWOULDBLOCK) {
			err = errors.New("another process uses it; choose another one by --data")
		}
		return nil, errors.Join(fmt.Errorf("lock data folder %s: %w", dir, err), f.Close())
	}
	return f, nil
}
