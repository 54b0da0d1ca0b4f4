package main

import (
	"fmt"
	"strings"

	"github.com/urfave/cli/v2"
)

// bash and zsh ask dedupctl itself. The word under the cursor counts only when it begins a flag: a verb that is
// typed to its end would be taken for one that is given.
const (
	bashCompletion = `# bash completion of dedupctl:  source <(dedupctl completion bash)
# For all shells: dedupctl completion bash > /usr/share/bash-completion/completions/dedupctl
_dedupctl() {
  local cur=${COMP_WORDS[COMP_CWORD]} flag="" IFS=$'\n'
  [[ $cur == -* ]] && flag=$cur
  local found=$("${COMP_WORDS[@]:0:COMP_CWORD}" "$flag" --generate-bash-completion 2>/dev/null)
  COMPREPLY=($(compgen -W "$found" -- "$cur"))
}
complete -o default -F _dedupctl dedupctl
`
	zshCompletion = `#compdef dedupctl
# zsh completion of dedupctl:  source <(dedupctl completion zsh)
# For all shells: dedupctl completion zsh > "${fpath[1]}/_dedupctl"
_dedupctl() {
  local flag=""
  [[ $words[CURRENT] == -* ]] && flag=$words[CURRENT]
  local -a found=("${(@f)$("${(@)words[1,CURRENT-1]}" "$flag" --generate-bash-completion 2>/dev/null)}")
  if [[ -n $found[1] ]]; then compadd -- $found; else _files; fi
}
if [[ $funcstack[1] == _dedupctl ]]; then _dedupctl; else compdef _dedupctl dedupctl; fi
`
)

func completionCommand() *cli.Command {
	return &cli.Command{
		Name:      "completion",
		Usage:     "print what makes a shell complete verbs and flags: bash, zsh or fish",
		ArgsUsage: "SHELL",
		Description: "bash  source <(dedupctl completion bash), in ~/.bashrc\n" +
			"zsh   source <(dedupctl completion zsh), in ~/.zshrc after compinit\n" +
			"fish  dedupctl completion fish > ~/.config/fish/completions/dedupctl.fish",
		Action: func(c *cli.Context) error {
			if c.NArg() != 1 {
				return usageError{fmt.Errorf("completion: want one SHELL: bash, zsh or fish")}
			}
			text, err := completionOf(c.App, c.Args().First())
			if err != nil {
				return err
			}
			_, err = fmt.Fprint(c.App.Writer, text)
			return err
		},
		BashComplete: func(c *cli.Context) { fmt.Fprintln(c.App.Writer, "bash\nzsh\nfish") },
	}
}

func completionOf(app *cli.App, shell string) (string, error) {
	switch shell {
	case "bash":
		return bashCompletion, nil
	case "zsh":
		return zshCompletion, nil
	case "fish":
		text, err := app.ToFishCompletion()
		return strings.TrimLeft(text, "\n"), err
	}
	return "", usageError{fmt.Errorf("completion: shell %q: want bash, zsh or fish", shell)}
}
