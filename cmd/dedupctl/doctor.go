package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"

	"github.com/urfave/cli/v2"

	"github.com/dedup-snapshotter/dedup-snapshotter/cmd/dedupctl/internal/doctor"
	dedupv1 "github.com/dedup-snapshotter/dedup-snapshotter/proto/dedup/v1"
	"github.com/dedup-snapshotter/dedup-snapshotter/snapshotter/lower"
)

const defaultDaemonConfig = "/etc/containerd-dedup-grpc/config.toml"

// errProblems tells the exit code.
var errProblems = errors.New("this node has a problem")

func doctorCommand() *cli.Command {
	return &cli.Command{
		Name:  "doctor",
		Usage: "whether this node can serve images with dedup, and how well",
		Description: "Tries out the kernel and the file system, and looks at the daemon, containerd and its " +
			"configuration, and for\n" +
			"mounts that were left behind. It changes nothing, and works while the daemon does not run.\n" +
			"Exit codes: 0 no problem (there may be warnings), 1 it could not look, 2 the command line is wrong, 3 there is " +
			"a problem.",
		Flags: []cli.Flag{
			&cli.StringFlag{Name: "config", Usage: "the daemon's config `FILE`", Value: defaultDaemonConfig},
			&cli.StringFlag{Name: "containerd-config",
				Usage: "containerd's main config `FILE`; by default the one that the running containerd was started with"},
			&cli.BoolFlag{Name: "quiet", Aliases: []string{"q"}, Usage: "show only what is not ok"},
		},
		Action: runDoctor,
	}
}

// Diagnosis is what `doctor --json` prints.
type Diagnosis struct {
	Problems int              `json:"problems"`
	Warnings int              `json:"warnings"`
	Findings []doctor.Finding `json:"findings"`
}

func runDoctor(c *cli.Context) error {
	if os.Geteuid() != 0 {
		return errors.New("doctor looks at mounts, other processes and sockets of root: run it as root " +
			"(sudo dedupctl doctor)")
	}
	settings, err := doctor.ReadSettings(c.String("config"), doctor.Settings{Root: defaultRoot, Address: defaultAddress,
		ContainerdAddress: defaultContainerd})
	if err != nil {
		return err
	}
	socket := settings.Address
	if at := global(c, "address"); at.IsSet("address") {
		socket = address(c)
	}
	ctdConfig := c.String("containerd-config")
	if ctdConfig != "" {
		if ctdConfig, err = filepath.Abs(ctdConfig); err != nil {
			return err
		}
	}
	findings, err := doctor.Examine(c.Context, doctor.Options{
		Version: version, Address: socket, Settings: settings, ContainerdConfig: ctdConfig,
		Self: self,
		Ask:  func(ctx context.Context) (*doctor.Self, error) { return askSelf(ctx, socket) },
	})
	if err != nil {
		return err
	}
	d := diagnose(findings, c.Bool("quiet"))
	if err := print(c, d, writeDiagnosis); err != nil {
		return err
	}
	if d.Problems > 0 {
		return errProblems
	}
	return nil
}

// tryOverlay is the verb that doctor runs in a user namespace.
const tryOverlay = "try-overlay"

// self makes a command that runs that verb of this program.
func self(args ...string) *exec.Cmd {
	return exec.Command("/proc/self/exe", append([]string{tryOverlay}, args...)...)
}

func tryOverlayCommand() *cli.Command {
	return &cli.Command{
		Name: tryOverlay, Hidden: true, ArgsUsage: "LOWER UPPER WORK MERGED",
		Usage: "mount an overlay; doctor runs it in a user namespace",
		Action: func(c *cli.Context) error {
			if c.NArg() != 4 {
				return usageError{errors.New(tryOverlay + " is what doctor runs: want LOWER UPPER WORK MERGED")}
			}
			args := c.Args()
			return lower.MountAsUser(args.Get(0), args.Get(1), args.Get(2), args.Get(3))
		},
	}
}

func askSelf(ctx context.Context, socket string) (*doctor.Self, error) {
	conn, err := dial(ctx, socket)
	if err != nil {
		return nil, explainDial(socket, "containerd-dedup-grpc", "--address", err)
	}
	defer conn.Close()
	r, err := dedupv1.NewControlClient(conn).Doctor(ctx, &dedupv1.DoctorRequest{})
	if err != nil {
		return nil, explainCall(socket, err)
	}
	return &doctor.Self{
		Version: r.GetVersion(), Root: r.GetRoot(), RunDir: r.GetRunDir(), ContainerdAddress: r.GetContainerdAddress(),
		ContainerdVersion: r.GetContainerdVersion(), ContainerdError: r.GetContainerdError(), IdleMounts: r.GetIdleMounts(),
		Refuses: r.GetRefuses(), DamagedLayers: r.GetDamagedLayers(), LostImages: r.GetLostImages(),
		Blobs: r.GetBlobs(), DroppableBlobs: r.GetDroppableBlobs(), DroppableBytes: r.GetDroppableBytes(),
	}, nil
}

func diagnose(findings []doctor.Finding, quiet bool) Diagnosis {
	d := Diagnosis{Findings: []doctor.Finding{}}
	for _, f := range findings {
		switch f.Severity {
		case doctor.Problem:
			d.Problems++
		case doctor.Warning:
			d.Warnings++
		case doctor.OK:
			if quiet {
				continue
			}
		}
		d.Findings = append(d.Findings, f)
	}
	return d
}

func writeDiagnosis(w io.Writer, d Diagnosis) {
	area := ""
	for _, f := range d.Findings {
		if a, _, _ := strings.Cut(f.Check, "."); a != area {
			if area != "" {
				fmt.Fprintln(w)
			}
			fmt.Fprintln(w, a)
			area = a
		}
		// What others say may have several lines.
		fmt.Fprintf(w, "  %-8s %s\n", f.Severity, strings.ReplaceAll(f.Message, "\n", "\n           "))
		if f.Remedy != "" {
			fmt.Fprintf(w, "           > %s\n", f.Remedy)
		}
	}
	if area != "" {
		fmt.Fprintln(w)
	}
	fmt.Fprintf(w, "%s, %s\n", plural(int64(d.Problems), "problem", "problems"),
		plural(int64(d.Warnings), "warning", "warnings"))
}
