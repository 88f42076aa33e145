package main

import (
	"bytes"
	"cmp"
	"fmt"
	"io"
	"os"
	"slices"
	"strings"
	"time"

	"golang.org/x/term"

	dunlinv1 "github.com/dunlin/dunlin/proto/dunlin/v1"
)

const (
	// fewDevices are shown one by one without being asked for.
	fewDevices = 20
	// fewNames are named where devices are listed on a line.
	fewNames = 3
	// barWidth is that of a wave's bar, in characters.
	barWidth = 24
)

// tables are written, one below the other.
type tables []*table

func (p tables) write(w io.Writer) error {
	for i, t := range p {
		if i > 0 {
			fmt.Fprintln(w)
		}
		if err := t.write(w); err != nil {
			return err
		}
	}
	return nil
}

// rolloutPage shows all of a rollout; each device where they are few, or where
// all are asked for.
func rolloutPage(now time.Time, r *dunlinv1.Rollout, all bool) tables {
	p := tables{rolloutsTable(now, []*dunlinv1.Rollout{r})}
	if len(r.GetWaves()) > 0 {
		p = append(p, wavesTable(now, r))
	}
	if len(r.GetGates()) > 0 {
		p = append(p, gatesTable(r.GetGates()))
	}
	if t := failuresTable(r.GetDevices()); len(t.rows) > 0 {
		p = append(p, t)
	}
	if n := len(r.GetDevices()); n > 0 && (n <= fewDevices || all) {
		p = append(p, rolloutDevicesTable(r.GetDevices()))
	}
	return p
}

func wavesTable(now time.Time, r *dunlinv1.Rollout) *table {
	t := &table{header: []string{"WAVE", "DEVICES OF", "PROGRESS", "READY", "FAILED", "AWAY", "BEGAN", "SOAKS"}}
	for i, w := range r.GetWaves() {
		soaks := ""
		if until := r.GetSoaksUntil(); until != nil && int(r.GetWave()) == i+1 && !ended(r) {
			soaks = "over"
			if left := until.AsTime().Sub(now); left > 0 {
				soaks = durationText(left) + " more"
			}
		}
		t.add(fmt.Sprint(i+1), w.GetName(), "["+bar(barWidth, w.GetDevices(), w.GetReady(), w.GetFailed(), w.GetExcused())+"]",
			fmt.Sprintf("%d/%d", w.GetReady(), w.GetDevices()), countText(w.GetFailed()), countText(w.GetExcused()), ago(now, w.GetStartedAt()), soaks)
	}
	return t
}

// bar draws ready as #, failed as x, excused as - and the rest of total as
// dots. What there is any of has a character at least.
func bar(width int, total, ready, failed, excused uint32) string {
	parts := []uint32{ready, failed, excused, total - min(total, ready+failed+excused)}
	var cells [4]int
	sum := 0
	for i, n := range parts {
		if n > 0 && total > 0 {
			cells[i] = max(1, int(uint64(n)*uint64(width)/uint64(total)))
		}
		sum += cells[i]
	}
	// The largest part takes what rounding left, or took.
	largest := slices.Index(parts, slices.Max(parts))
	if total == 0 {
		largest = len(parts) - 1
	}
	cells[largest] = max(0, cells[largest]+width-sum)
	var b strings.Builder
	for i, mark := range []string{"#", "x", "-", "."} {
		b.WriteString(strings.Repeat(mark, cells[i]))
	}
	return b.String()
}

func countText(n uint32) string {
	if n == 0 {
		return ""
	}
	return fmt.Sprint(n)
}

var gateHeader = []string{"GATE", "CLASS", "VERDICT", "NEW", "OLD", "VALUE", "LIMIT", "REQUESTS", "REASON"}

func gatesTable(gates []*dunlinv1.GateResult) *table {
	t := &table{header: gateHeader}
	for _, g := range gates {
		t.add(gateCells(g)...)
	}
	return t
}

func gateCells(g *dunlinv1.GateResult) []string {
	figure := func(v *float64) string {
		if v == nil {
			return ""
		}
		switch g.GetGate() {
		case "errorRate":
			return fmt.Sprintf("%.3g%%", 100**v)
		case "p99":
			return secondsText(*v)
		case "energy":
			return joulesText(*v)
		}
		return fmt.Sprintf("%.3g", *v)
	}
	// What is compared is a share for errors, and a ratio or an index else.
	compared := func(v float64) string {
		if g.GetGate() == "errorRate" {
			return fmt.Sprintf("%.3g%%", 100*v)
		}
		return fmt.Sprintf("%.3g", v)
	}
	value := ""
	if g.Value != nil {
		value = compared(g.GetValue())
	}
	return []string{g.GetGate(), g.GetClass(), strings.ReplaceAll(enumText(g.GetVerdict(), "VERDICT_"), "_", " "), figure(g.NewFigure), figure(g.OldFigure), value, compared(g.GetLimit()),
		fmt.Sprintf("%d against %d", g.GetNewSamples(), g.GetOldSamples()), g.GetReason()}
}

// failuresTable groups the devices that failed by what they say, the most
// frequent first.
func failuresTable(devices []*dunlinv1.RolloutDevice) *table {
	t := &table{header: []string{"FAILED", "REASON", "DEVICES"}}
	by := map[string][]string{}
	for _, d := range devices {
		if d.GetPhase() == dunlinv1.RolloutDevice_PHASE_FAILED {
			by[d.GetReason()] = append(by[d.GetReason()], d.GetDevice())
		}
	}
	reasons := make([]string, 0, len(by))
	for reason := range by {
		reasons = append(reasons, reason)
	}
	slices.SortFunc(reasons, func(a, b string) int { return cmp.Or(len(by[b])-len(by[a]), cmp.Compare(a, b)) })
	for _, reason := range reasons {
		t.add(fmt.Sprint(len(by[reason])), reason, listText(by[reason]))
	}
	return t
}

// listText names some of many.
func listText(names []string) string {
	if len(names) <= fewNames {
		return strings.Join(names, ", ")
	}
	return fmt.Sprintf("%s and %d more", strings.Join(names[:fewNames], ", "), len(names)-fewNames)
}

func rolloutDevicesTable(devices []*dunlinv1.RolloutDevice) *table {
	t := &table{header: []string{"DEVICE", "CLASS", "WAVE", "PHASE", "FETCHED", "REASON"}}
	for _, d := range devices {
		fetched := ""
		if d.GetBytesTotal() > 0 {
			fetched = bytesText(int64(d.GetBytesPresent())) + " of " + bytesText(int64(d.GetBytesTotal()))
		}
		phase := strings.ReplaceAll(enumText(d.GetPhase(), "PHASE_"), "_", " ")
		if d.GetExcused() {
			phase += ", not waited for"
		}
		t.add(d.GetDevice(), d.GetClass(), countText(d.GetWave()), phase, fetched, d.GetReason())
	}
	return t
}

// rolloutState writes a rollout's state as one says it.
func rolloutState(r *dunlinv1.Rollout) string {
	return strings.ReplaceAll(enumText(r.GetState(), "ROLLOUT_STATE_"), "_", " ")
}

// decisionsPage shows decisions and, below them, the gates that they rest on.
func decisionsPage(now time.Time, decisions []*dunlinv1.Decision) tables {
	t := &table{header: []string{"WHEN", "DECISION", "WAVE", "BY", "DEVICES", "REASON"}}
	gates := &table{header: append([]string{"WHEN", "DECISION"}, gateHeader...)}
	for _, d := range decisions {
		devices := ""
		switch names := d.GetDevices(); {
		case int(d.GetDeviceCount()) > min(len(names), fewNames):
			names = names[:min(len(names), fewNames)]
			devices = fmt.Sprintf("%s and %d more", strings.Join(names, ", "), int(d.GetDeviceCount())-len(names))
		case len(names) > 0:
			devices = listText(names)
		}
		t.add(ago(now, d.GetAt()), d.GetKind(), countText(d.GetWave()), d.GetBy(), devices, d.GetReason())
		for _, g := range d.GetGates() {
			gates.add(append([]string{ago(now, d.GetAt()), d.GetKind()}, gateCells(g)...)...)
		}
	}
	if len(gates.rows) == 0 {
		return tables{t}
	}
	return tables{t, gates}
}

// livePage shows a page on a terminal, each in the place of the one before.
type livePage struct {
	w     io.Writer
	size  func() (width, height int)
	lines int // that are shown
}

// newLivePage gives nil where w is no terminal.
func newLivePage(w io.Writer) *livePage {
	f, ok := w.(*os.File)
	if !ok || !isTerminal(w) {
		return nil
	}
	return &livePage{w: w, size: func() (int, int) {
		width, height, err := term.GetSize(int(f.Fd()))
		if err != nil || width <= 0 || height <= 0 {
			return 80, 24
		}
		return width, height
	}}
}

// show draws p, cut to the size of the terminal.
func (l *livePage) show(p tables) {
	var text bytes.Buffer
	if err := p.write(&text); err != nil {
		return // a buffer takes all
	}
	width, height := l.size()
	lines := strings.Split(strings.TrimSuffix(text.String(), "\n"), "\n")
	lines = lines[:min(len(lines), max(height-1, 1))]
	var b strings.Builder
	b.WriteString(l.up())
	for _, line := range lines {
		if r := []rune(line); len(r) > width-1 {
			line = string(r[:max(width-1, 0)])
		}
		b.WriteString(line + "\n")
	}
	l.lines = len(lines)
	io.WriteString(l.w, b.String())
}

// clear takes what is shown away. l may be nil.
func (l *livePage) clear() {
	if l != nil && l.lines > 0 {
		io.WriteString(l.w, l.up())
		l.lines = 0
	}
}

// up moves to where the page began, and clears from there.
func (l *livePage) up() string {
	if l.lines == 0 {
		return ""
	}
	return fmt.Sprintf("\x1b[%dA\r\x1b[J", l.lines)
}
