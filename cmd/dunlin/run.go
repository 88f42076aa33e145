package main

import (
	"context"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"os"
	"strings"
	"time"

	"connectrpc.com/connect"
	"github.com/spf13/cobra"
	"golang.org/x/term"
)

// Exit codes; "dunlin help exit-codes" explains them.
const (
	exitOK            = 0
	exitError         = 1
	exitUsage         = 2
	exitNotAllowed    = 4
	exitRolloutFailed = 5
	exitTimeout       = 6
)

const exitCodesHelp = `Exit codes of dunlin:

  0  done
  1  an error; the message says what and, where it can, what to do
  2  wrong usage: an unknown command, flag or argument
  4  not allowed: not logged in, the token is wrong, or the role is too small
  5  a rollout failed, halted, was rolled back or aborted, or a newer one took
     its place
  6  --timeout passed

"dunlin diff" is different, as diff is: 0 where nothing differs, 1 where
something does, 2 on trouble (4 where it is not allowed). So is "dunlin plan":
1 where a version does not fit on a device, 2 on trouble.
`

// codeError is an error that has an exit code of its own.
type codeError struct {
	code  int
	err   error // nil: there is nothing left to say
	usage bool  // the verb's help says more
}

func (e codeError) Error() string {
	if e.err == nil {
		return ""
	}
	return e.err.Error()
}
func (e codeError) Unwrap() error { return e.err }

func usagef(format string, args ...any) error {
	return codeError{code: exitUsage, err: fmt.Errorf(format, args...), usage: true}
}

// arguments checks that a verb has so many arguments.
func arguments(least, most int) cobra.PositionalArgs {
	return func(cmd *cobra.Command, args []string) error {
		usage, _, _ := strings.Cut(cmd.UseLine(), " [flags]")
		switch {
		case len(args) < least:
			return usagef("an argument is missing\nusage: %s", usage)
		case len(args) > most:
			return usagef("unexpected argument %q\nusage: %s", args[most], usage)
		}
		return nil
	}
}

// exclusive says whether at most one of some flags is given.
func exclusive(cmd *cobra.Command, names ...string) error {
	var given []string
	for _, n := range names {
		if cmd.Flags().Changed(n) {
			given = append(given, "--"+n)
		}
	}
	if len(given) > 1 {
		return usagef("%s exclude each other", strings.Join(given, " and "))
	}
	return nil
}

// cli is what every verb works with.
type cli struct {
	in         io.Reader
	out, err   io.Writer
	watchGrace time.Duration
	context    string // what --context names
	yes        bool   // go on without asking
	noInput    bool   // ask nothing
}

// run executes one command line and gives its exit code. Data goes to stdout,
// all the rest to stderr.
func run(ctx context.Context, args []string, stdin io.Reader, stdout, stderr io.Writer) int {
	c := &cli{in: stdin, out: stdout, err: stderr, watchGrace: watchGrace}
	root := c.root()
	// Until a verb runs, whatever is wrong is wrong usage.
	started := false
	root.PersistentPreRun = func(*cobra.Command, []string) { started = true }
	root.SetArgs(args)
	root.SetIn(stdin)
	root.SetOut(stdout)
	root.SetErr(stderr)
	cmd, err := root.ExecuteContextC(ctx)
	if err == nil {
		return exitOK
	}
	if ctx.Err() != nil && errors.Is(err, context.Canceled) {
		err = errors.New("interrupted")
	}
	code := exitCode(err)
	e, _ := errors.AsType[codeError](err)
	usage := e.usage || !started
	if !started {
		code = exitUsage
	}
	text := message(err)
	if text == "" {
		return code
	}
	text += c.advice(ctx, cmd, err)
	fmt.Fprintf(stderr, "dunlin: %s\n", text)
	if usage && !strings.Contains(text, "\nrun: ") {
		fmt.Fprintf(stderr, "run: %s --help\n", cmd.CommandPath())
	}
	return code
}

func exitCode(err error) int {
	if e, ok := errors.AsType[codeError](err); ok {
		return e.code
	}
	switch connect.CodeOf(err) {
	case connect.CodeUnauthenticated, connect.CodePermissionDenied:
		return exitNotAllowed
	}
	return exitError
}

// message is what an error says to a person: without the names of the
// protocol's codes, with what to do next where that is known.
func message(err error) string {
	text := err.Error()
	e, ok := errors.AsType[*connect.Error](err)
	if !ok {
		return text
	}
	text = strings.Replace(text, e.Error(), e.Message(), 1)
	switch e.Code() {
	case connect.CodeUnauthenticated:
		text += "\nrun: dunlin login URL"
	case connect.CodeUnavailable:
		if _, ok := errors.AsType[x509.UnknownAuthorityError](err); ok {
			return text + "\nA controller with an authority of its own is known by --ca, the file ca.pem in its data folder. See: dunlin login --help"
		}
		text += "\nIs the controller running, and is its URL right? See: dunlin login --help"
	case connect.CodeUnimplemented:
		text = strings.TrimSuffix(text, ": ") + ": what answers there does not know this call\nIs the URL that of a controller, and not of an older one than this program? See: dunlin login --help"
	}
	return text
}

func (c *cli) root() *cobra.Command {
	root := &cobra.Command{
		Use:   "dunlin",
		Short: "Run ONNX models on a fleet of devices",
		Long: `dunlin pushes ONNX models to a controller's registry, applies deployments and
routes, and shows what the fleet of devices does with them.

"dunlin login" stores a context for each controller; "dunlin context use", the
environment's DUNLIN_CONTEXT and --context say, the last first, which one counts.

Environment: DUNLIN_URL, DUNLIN_TOKEN and DUNLIN_CA, a PEM file, override what
is stored, unless --context is given.`,
		SilenceUsage:  true,
		SilenceErrors: true,
		RunE: func(cmd *cobra.Command, _ []string) error {
			cmd.SetOut(c.err)
			if err := cmd.Help(); err != nil {
				return err
			}
			return codeError{code: exitUsage}
		},
	}
	root.PersistentFlags().StringVar(&c.context, "context", "", "the stored controller to talk to, by its name")
	root.PersistentFlags().BoolVarP(&c.yes, "yes", "y", false, "do not ask before something is destroyed or the whole fleet changes")
	root.PersistentFlags().BoolVar(&c.noInput, "no-input", false, "ask nothing: fail where an answer is needed")
	root.AddCommand(
		c.loginCommand(), c.logoutCommand(), c.contextCommand(), c.whoamiCommand(), c.userCommand(), c.tokenCommand(), c.pushCommand(), c.applyCommand(), c.diffCommand(), c.planCommand(), c.deleteCommand(),
		c.getCommand(), c.modelCommand(), c.profileCommand(), c.joinTokenCommand(), c.deviceCommand(), c.authorityCommand(), c.rolloutCommand(), c.driftCommand(), c.telemetryCommand(), c.inferCommand(),
		c.freezeCommand(), c.unfreezeCommand(), c.routeCommand(), c.topCommand(),
		c.bundleCommand(), c.auditCommand(), c.keysCommand(), c.trustCommand(), c.signAgentCommand(), c.pushAgentCommand(), c.versionCommand(), c.manCommand(),
		&cobra.Command{Use: "exit-codes", Short: "What the exit codes mean", Long: exitCodesHelp},
	)
	if err := c.addCompletion(root); err != nil {
		panic(err) // a verb or flag that is named there is none
	}
	root.InitDefaultHelpCmd()
	if help, _, err := root.Find([]string{"help"}); err == nil {
		help.Args = func(_ *cobra.Command, args []string) error {
			if _, rest, err := root.Find(args); err != nil || len(rest) > 0 {
				return usagef("no help on %q", strings.Join(args, " "))
			}
			return nil
		}
	}
	return root
}

// group is a command that only holds others.
func group(use, short string, subs ...*cobra.Command) *cobra.Command {
	g := &cobra.Command{Use: use, Short: short, RunE: func(cmd *cobra.Command, args []string) error {
		if len(args) > 0 {
			return usagef("unknown command %q for %q", args[0], cmd.CommandPath())
		}
		return usagef("%q needs a command", cmd.CommandPath())
	}}
	g.AddCommand(subs...)
	return g
}

// isTerminal says whether w is a terminal that takes control sequences.
func isTerminal(w any) bool {
	f, ok := w.(*os.File)
	return ok && os.Getenv("TERM") != "dumb" && term.IsTerminal(int(f.Fd()))
}

// coloured says whether w should be written to in colour.
func coloured(w any) bool { return isTerminal(w) && os.Getenv("NO_COLOR") == "" }
