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
		Name:            "dedupctl",
		Usage:           "see what containerd-dedup-grpc stores, and set it up",
		Version:         version,
		Description:     "Exit codes: 0 done, 1 it did not work, 2 the command line is wrong, 3 fsck: there is damage; doctor: there is a problem.",
		HideHelpCommand: true,
		Flags:           globalFlags(),
		Commands: []*cli.Command{
			statusCommand(),
			imagesCommand(),
			layersCommand(),
			duplicatesCommand(),
			analyzeCommand(),
			completeCommand(),
			migrateCommand(),
			gcCommand(),
			fsckCommand(),
			doctorCommand(),
			configCommand(),
			completionCommand(),
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
					return usageError{fmt.Errorf("%s: %s stands behind an argument: flags come first (see --help)", c.Command.FullName(), arg)}
				}
			}
			return action(c)
		}
	}
}

func onUsageError(_ *cli.Context, err error, _ bool) error {
	return usageError{fmt.Errorf("%w (see --help)", err)}
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
	return usageError{fmt.Errorf("unknown command %q: want %s (see --help)", c.Args().First(), verbs)}
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
