package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/rogpeppe/go-internal/diff"
	"github.com/spf13/cobra"

	dunlinv1 "github.com/dunlin/dunlin/proto/dunlin/v1"
)

// maxDocuments bounds what is applied at once, as the API does.
const maxDocuments = 1 << 20

const documentsHelp = `Each -f is a file, - for standard input, or a folder, whose *.yaml and *.yml
files are taken in the order of their names.`

func (c *cli) applyCommand() *cobra.Command {
	var files []string
	var dryRun bool
	cmd := &cobra.Command{
		Use:   "apply -f FILE|-|DIR",
		Short: "Apply deployments, routes, freezes and maintenances",
		Long: "apply checks all documents and applies all of them or none. Devices on which a\n" +
			"version does not fit are named; they keep what they have. See: dunlin plan\n\n" + documentsHelp,
		Example: "  dunlin apply -f digits.yaml\n" +
			"  dunlin apply -f fleet/",
		Args: arguments(0, 0),
		RunE: func(cmd *cobra.Command, _ []string) error {
			res, err := c.applyDocuments(cmd.Context(), files, dryRun)
			if err != nil {
				return err
			}
			for _, ch := range res.GetChanges() {
				c.printChange(ch, dryRun)
			}
			for _, p := range res.GetRefused() {
				fmt.Fprintf(c.out, "deployment/%s refused on %s: %s:%d does not fit: %s\n", p.GetDeployment(), plain(p.GetDevice()), p.GetModel(), p.GetVersion(), plain(p.GetReason()))
			}
			return nil
		},
	}
	cmd.Flags().StringArrayVarP(&files, "file", "f", nil, "file, - or folder with YAML documents")
	cmd.Flags().BoolVar(&dryRun, "dry-run", false, "only check, and say what would change")
	return cmd
}

func (c *cli) diffCommand() *cobra.Command {
	var files []string
	cmd := &cobra.Command{
		Use:   "diff -f FILE|-|DIR",
		Short: "Show what apply would change",
		Long: "diff shows, as a unified diff of canonical YAML, what apply would change.\n" +
			"It exits 0 where nothing differs, 1 where something does, 2 on trouble.\n\n" + documentsHelp,
		Args: arguments(0, 0),
		RunE: func(cmd *cobra.Command, _ []string) error {
			differs, err := c.diff(cmd.Context(), files)
			switch {
			case err != nil && exitCode(err) == exitError:
				return codeError{code: exitUsage, err: errors.New(message(err))}
			case err != nil:
				return err
			case differs:
				return codeError{code: exitError}
			}
			return nil
		},
	}
	cmd.Flags().StringArrayVarP(&files, "file", "f", nil, "file, - or folder with YAML documents")
	return cmd
}

func (c *cli) deleteCommand() *cobra.Command {
	return &cobra.Command{
		Use:     "delete KIND NAME",
		Short:   "Delete a deployment, a route, a freeze or a maintenance",
		Example: "  dunlin delete route digits",
		Args:    arguments(2, 2),
		RunE: func(cmd *cobra.Command, args []string) error {
			kinds := map[string]string{
				"deployment": "Deployment", "deployments": "Deployment", "route": "Route", "routes": "Route",
				"freeze": "Freeze", "freezes": "Freeze", "maintenance": "Maintenance", "maintenances": "Maintenance",
			}
			kind, ok := kinds[strings.ToLower(args[0])]
			if !ok {
				return usagef("cannot delete a %q: kinds are deployment, route, freeze and maintenance (devices: dunlin device remove NAME; versions: dunlin model delete NAME:VERSION)", args[0])
			}
			ctl, err := c.client()
			if err != nil {
				return err
			}
			if err := c.confirm(cmd.Context(), args[1], "this deletes %s %s", strings.ToLower(kind), args[1]); err != nil {
				return err
			}
			res, err := call(cmd.Context(), ctl.objects().Delete, &dunlinv1.DeleteRequest{Kind: kind, Name: args[1]})
			if err != nil {
				return fmt.Errorf("delete: %w", err)
			}
			c.printChange(res.GetChange(), false)
			return nil
		},
	}
}

func (c *cli) printChange(ch *dunlinv1.ObjectChange, dryRun bool) {
	done := strings.ToLower(strings.TrimPrefix(ch.GetAction().String(), "ACTION_"))
	if dryRun {
		done += " (dry run)"
	}
	if ch.GetRollout() != "" {
		done += ", rollout " + ch.GetRollout()
	}
	fmt.Fprintf(c.out, "%s/%s %s\n", strings.ToLower(ch.GetKind()), ch.GetName(), done)
}

func (c *cli) applyDocuments(ctx context.Context, files []string, dryRun bool) (*dunlinv1.ApplyResponse, error) {
	documents, where, err := c.readDocuments(files)
	if err != nil {
		return nil, err
	}
	ctl, err := c.client()
	if err != nil {
		return nil, err
	}
	res, err := call(ctx, ctl.objects().Apply, &dunlinv1.ApplyRequest{Documents: documents, DryRun: dryRun})
	if err != nil && len(where) > 1 {
		err = fmt.Errorf("%w\nLines count through all files: %s", err, strings.Join(where, ", "))
	}
	return res, err
}

func (c *cli) diff(ctx context.Context, files []string) (differs bool, err error) {
	res, err := c.applyDocuments(ctx, files, true)
	if err != nil {
		return false, err
	}
	for _, ch := range res.GetChanges() {
		if ch.GetBefore() == ch.GetAfter() {
			continue
		}
		differs = true
		name := strings.ToLower(ch.GetKind()) + "/" + ch.GetName()
		text := string(diff.Diff(name+" (now)", []byte(ch.GetBefore()), name+" (applied)", []byte(ch.GetAfter())))
		// Its first line repeats the names in a form of its own.
		if first, rest, ok := strings.Cut(text, "\n"); ok && strings.HasPrefix(first, "diff ") {
			text = rest
		}
		if coloured(c.out) {
			text = colourDiff(text)
		}
		if _, err := io.WriteString(c.out, text); err != nil {
			return differs, err
		}
	}
	return differs, nil
}

func colourDiff(text string) string {
	var b strings.Builder
	for line := range strings.Lines(text) {
		colour := ""
		switch {
		case strings.HasPrefix(line, "---"), strings.HasPrefix(line, "+++"):
			colour = "\x1b[1m"
		case strings.HasPrefix(line, "@@"):
			colour = "\x1b[36m"
		case strings.HasPrefix(line, "-"):
			colour = "\x1b[31m"
		case strings.HasPrefix(line, "+"):
			colour = "\x1b[32m"
		}
		if colour == "" {
			b.WriteString(line)
			continue
		}
		b.WriteString(colour + strings.TrimSuffix(line, "\n") + "\x1b[0m\n")
	}
	return b.String()
}

// readDocuments joins the YAML documents of files. where says at which line
// of the whole each file starts.
func (c *cli) readDocuments(files []string) (documents string, where []string, err error) {
	if len(files) == 0 {
		return "", nil, usagef("-f is missing: the file, - or folder with YAML documents")
	}
	var b strings.Builder
	line := 1
	for _, f := range files {
		paths := []string{f}
		if info, err := os.Stat(f); f != "-" && err == nil && info.IsDir() {
			if paths, err = documentsIn(f); err != nil {
				return "", nil, err
			}
		}
		for _, path := range paths {
			text, err := c.readDocument(path)
			if err != nil {
				return "", nil, err
			}
			if b.Len() > 0 {
				b.WriteString("---\n")
				line++
			}
			where = append(where, fmt.Sprintf("%s from line %d", path, line))
			if !strings.HasSuffix(text, "\n") {
				text += "\n"
			}
			b.WriteString(text)
			line += strings.Count(text, "\n")
			if b.Len() > maxDocuments {
				return "", nil, fmt.Errorf("the documents have more than %d bytes together", maxDocuments)
			}
		}
	}
	return b.String(), where, nil
}

func documentsIn(dir string) ([]string, error) {
	entries, err := os.ReadDir(dir)
	if err != nil {
		return nil, fmt.Errorf("read documents: %w", err)
	}
	var paths []string
	for _, e := range entries {
		if ext := filepath.Ext(e.Name()); !e.IsDir() && (ext == ".yaml" || ext == ".yml") {
			paths = append(paths, filepath.Join(dir, e.Name()))
		}
	}
	if len(paths) == 0 {
		return nil, fmt.Errorf("read documents: %s has no *.yaml or *.yml file", dir)
	}
	slices.Sort(paths)
	return paths, nil
}

func (c *cli) readDocument(path string) (string, error) {
	in := c.in
	if path != "-" {
		f, err := os.Open(path)
		if err != nil {
			return "", fmt.Errorf("read documents: %w", err)
		}
		defer f.Close()
		in = f
	}
	b, err := io.ReadAll(io.LimitReader(in, maxDocuments+1))
	if err != nil {
		return "", fmt.Errorf("read documents: %w", err)
	}
	if len(b) > maxDocuments {
		return "", fmt.Errorf("read documents: %s has more than %d bytes", path, maxDocuments)
	}
	if len(strings.TrimSpace(string(b))) == 0 {
		return "", errors.New("read documents: " + path + " is empty")
	}
	return string(b), nil
}
