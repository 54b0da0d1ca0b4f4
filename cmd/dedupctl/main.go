// Command dedupctl shows an operator what the daemon containerd-dedup-grpc stores, and how to set it up.
//
// Exit codes: 0 done, 1 it did not work (the message says what to do), 2 the command line is wrong, 3 fsck found damage
// that is still there, or doctor a problem.
package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"
	"strings"

	"github.com/urfave/cli/v2"
	"golang.org/x/sys/unix"
)

// version is set by the linker.
var version = "unknown"

const (
	exitOK      = 0
	exitFailure = 1
	exitUsage   = 2
	// exitDamage: fsck found damage that is still there, or doctor a problem.
	exitDamage = 3
)

const (
	defaultAddress = "/run/containerd-dedup-grpc/containerd-dedup-grpc.sock"
	defaultRoot    = "/var/lib/containerd-dedup-grpc"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), unix.SIGTERM, unix.SIGINT)
	code := run(ctx, os.Args, os.Stdout, os.Stderr)
	stop()
	os.Exit(code)
}

// usageError is a wrong command line.
type usageError struct{ error }

// run is the whole program; it returns the exit code.
func run(ctx context.Context, args []string, stdout, stderr io.Writer) int {
	err := newApp(stdout, stderr).RunContext(ctx, args)
	if err == nil {
		return exitOK
	}
	fmt.Fprintln(stderr, "dedupctl:", err)
	switch {
	case errors.As(err, new(usageError)):
		return exitUsage
	case errors.Is(err, errDamage), errors.Is(err, errProblems):
		return exitDamage
	}
	return exitFailure
}

func newApp(stdout, stderr io.Writer) *cli.App {
	app := &cli.App{
		Name:    "dedupctl",
		Usage:   "see what containerd-dedup-grpc stores, and set it up",
		Version: version,
		Description: "Exit codes: 0 done, 1 it did not work, 2 the command line is wrong, 3 fsck: there is damage; " +
			"doctor: there is a problem.",
		HideHelpCommand: true,
		Flags:           append(globalFlags(), cli.HelpFlag), // where there is a verb of that name, it is not added by itself
		Commands: []*cli.Command{
			statusCommand(),
			imagesCommand(),
			layersCommand(),
			duplicatesCommand(),
			analyzeCommand(),
			trimCommand(),
			completeCommand(),
			migrateCommand(),
			gcCommand(),
			fsckCommand(),
			doctorCommand(),
			tryOverlayCommand(),
			configCommand(),
			completionCommand(),
			helpCommand(),
		},
		EnableBashCompletion: true,
		Action:               needVerb,
		Writer:               stdout,
		ErrWriter:            stderr,
		OnUsageError:         onUsageError,
		// run turns errors into exit codes.
		ExitErrHandler: func(*cli.Context, error) {},
	}
	prepare(app.Commands)
	return app
}

// globalFlags stand before the verb or after it.
func globalFlags() []cli.Flag {
	return []cli.Flag{
		&cli.StringFlag{Name: "address", Usage: "the daemon's unix `SOCKET`", Value: defaultAddress},
		&cli.BoolFlag{Name: "json", Usage: "print JSON: sizes in bytes, nothing shortened"},
	}
}

// prepare gives every verb what all have in common.
func prepare(commands []*cli.Command) {
	for _, c := range commands {
		c.HideHelpCommand = true
		c.OnUsageError = onUsageError
		if len(c.Subcommands) > 0 {
			c.Action = needVerb
			prepare(c.Subcommands)
			continue
		}
		c.Flags = append(c.Flags, globalFlags()...)
		action := c.Action
		c.Action = func(c *cli.Context) error {
			if c.NArg() > 0 && c.Command.ArgsUsage == "" {
				return usageError{fmt.Errorf("%s: unexpected argument %q (see --help)", c.Command.FullName(), c.Args().First())}
			}
			for _, arg := range c.Args().Slice() {
				if len(arg) > 1 && arg[0] == '-' {
					return usageError{fmt.Errorf("%s: %s stands behind an argument: flags come first (see --help)",
						c.Command.FullName(), arg)}
				}
			}
			return action(c)
		}
	}
}

// undefinedFlag is how package flag begins its error about one.
const undefinedFlag = "flag provided but not defined: -"

func onUsageError(c *cli.Context, err error, _ bool) error {
	meant := ""
	if name, ok := strings.CutPrefix(err.Error(), undefinedFlag); ok && c.Command != nil {
		var names []string
		for _, f := range append(globalFlags(), c.Command.Flags...) {
			names = append(names, f.Names()...)
		}
		if name = closest(strings.TrimLeft(name, "-"), names); name != "" {
			meant = fmt.Sprintf("; did you mean --%s?", name)
		}
	}
	return usageError{fmt.Errorf("%w%s (see --help)", err, meant)}
}

// needVerb runs where a verb is missing or unknown.
func needVerb(c *cli.Context) error {
	var names []string
	for _, v := range c.Command.Subcommands {
		if !v.Hidden && v.Name != "help" {
			names = append(names, v.Name)
		}
	}
	verbs := strings.Join(names, ", ")
	if c.NArg() == 0 {
		return usageError{fmt.Errorf("what to do is missing: %s (see --help)", verbs)}
	}
	return usageError{unknown("command", c.Args().First(), names)}
}

// unknown says that a word is none of those that are known, and which of them may have been meant.
func unknown(what, word string, known []string) error {
	if meant := closest(word, known); meant != "" {
		return fmt.Errorf("unknown %s %q: did you mean %s? (see --help)", what, word, meant)
	}
	return fmt.Errorf("unknown %s %q: want %s (see --help)", what, word, strings.Join(known, ", "))
}

// closest returns the known word that a typing error may have made of, by at most two letters that were left out,
// added or changed, or two neighbours swapped; or that begins with it. "" when there is none.
func closest(word string, known []string) (best string) {
	least := min(2, len(word)/2) + 1
	for _, k := range known {
		if d := distance(word, k); d < least {
			best, least = k, d
		}
	}
	for _, k := range known {
		if best == "" && len(word) > 1 && strings.HasPrefix(k, word) {
			best = k
		}
	}
	return best
}

// distance counts the edits from one word to another.
func distance(a, b string) int {
	rows := make([][]int, len(a)+1)
	for i := range rows {
		rows[i] = make([]int, len(b)+1)
		for j := range rows[i] {
			switch {
			case i == 0 || j == 0:
				rows[i][j] = i + j
			case a[i-1] == b[j-1]:
				rows[i][j] = rows[i-1][j-1]
			default:
				rows[i][j] = 1 + min(rows[i-1][j-1], rows[i-1][j], rows[i][j-1])
				if i > 1 && j > 1 && a[i-1] == b[j-2] && a[i-2] == b[j-1] {
					rows[i][j] = min(rows[i][j], 1+rows[i-2][j-2])
				}
			}
		}
	}
	return rows[len(a)][len(b)]
}

func helpCommand() *cli.Command {
	return &cli.Command{
		Name:      "help",
		Usage:     "what a verb does, and its flags",
		ArgsUsage: "[VERB]",
		Action: func(c *cli.Context) error {
			// The same as VERB --help, whatever that is.
			args := append(append([]string{c.App.Name}, c.Args().Slice()...), "--help")
			if verbs := c.App.Commands; c.NArg() > 0 && c.App.Command(c.Args().First()) == nil {
				var names []string
				for _, v := range verbs {
					names = append(names, v.Name)
				}
				return usageError{unknown("command", c.Args().First(), names)}
			}
			return newApp(c.App.Writer, c.App.ErrWriter).RunContext(c.Context, args)
		},
	}
}

// global finds where on the command line a global flag was set, if anywhere.
func global(c *cli.Context, name string) *cli.Context {
	for _, at := range c.Lineage() {
		if at.Command != nil && at.IsSet(name) {
			return at
		}
	}
	return c
}

func jsonWanted(c *cli.Context) bool { return global(c, "json").Bool("json") }
func address(c *cli.Context) string  { return global(c, "address").String("address") }
