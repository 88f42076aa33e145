package main

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"time"

	cdplog "github.com/chromedp/cdproto/log"
	"github.com/chromedp/cdproto/network"
	"github.com/chromedp/cdproto/runtime"
	"github.com/chromedp/chromedp"
)

// look opens a page of each kind in both themes, and counts serious faults
// that axe finds and errors by the policy.
func (w *world) look(ctx context.Context, root string) (faults, violations int, err error) {
	axe, err := os.ReadFile(filepath.Join(root, "internal/e2e/console/testdata/axe.min.js"))
	if err != nil {
		return 0, 0, err
	}
	path, err := exec.LookPath("chromium")
	if err != nil {
		return 0, 0, fmt.Errorf("%w; sh internal/e2e/setup.sh installs it", err)
	}
	paths, err := w.crawl(ctx, 1)
	if err != nil {
		return 0, 0, err
	}
	options := append(chromedp.DefaultExecAllocatorOptions[:], chromedp.ExecPath(path), chromedp.NoSandbox, chromedp.WindowSize(1360, 860))
	ctx, stop := chromedp.NewExecAllocator(ctx, options...)
	defer stop()
	ctx, cancel := chromedp.NewContext(ctx)
	defer cancel()
	ctx, end := context.WithTimeout(ctx, 5*time.Minute)
	defer end()
	var mu sync.Mutex
	chromedp.ListenTarget(ctx, func(event any) {
		e, ok := event.(*cdplog.EventEntryAdded)
		if ok && strings.Contains(e.Entry.Text, "Content Security Policy") {
			mu.Lock()
			violations++
			mu.Unlock()
			fmt.Fprintln(os.Stderr, e.Entry.Text)
		}
	})
	set := func(name, value string) chromedp.Action {
		return chromedp.ActionFunc(func(ctx context.Context) error {
			return network.SetCookie(name, value).WithURL(w.url).Do(ctx)
		})
	}
	if err := chromedp.Run(ctx, set(w.cookies[0].Name, w.cookies[0].Value)); err != nil {
		return 0, 0, err
	}
	for _, theme := range []string{"light", "dark"} {
		for _, p := range append(paths, "/sign-in") {
			var found []string
			if err := chromedp.Run(ctx, set("dunlin_theme", theme), chromedp.Navigate(w.url+p), chromedp.WaitVisible("#main"), chromedp.Evaluate(string(axe)+`; void 0`, nil),
				chromedp.Evaluate(`axe.run().then(r => r.violations.filter(v => v.impact === 'serious' || v.impact === 'critical').map(v => v.id + ': ' + v.nodes.map(n => n.html).join('; ')))`, &found,
					func(p *runtime.EvaluateParams) *runtime.EvaluateParams { return p.WithAwaitPromise(true) })); err != nil {
				return 0, 0, fmt.Errorf("%s: %w", p, err)
			}
			for _, one := range found {
				fmt.Fprintf(os.Stderr, "%s, %s: %.300s\n", p, theme, one)
			}
			faults += len(found)
		}
	}
	mu.Lock()
	defer mu.Unlock()
	fmt.Printf("looked at %d pages in both themes\n", len(paths)+1)
	return faults, violations, nil
}
