package registry

import (
	"context"
	"io"
	"log/slog"
	"sync"
	"sync/atomic"

	distmetrics "github.com/distribution/distribution/v3/metrics"
	"github.com/prometheus/client_golang/prometheus"
	"github.com/sirupsen/logrus"
)

// The embedded registry logs through logrus's process-wide logger and counts
// in Prometheus's process-wide registry. quiet takes both away from it: its
// log goes to the slog logger of the Registry that was made last.
var (
	quietOnce sync.Once
	logTarget atomic.Pointer[slog.Logger]
)

func quiet(log *slog.Logger) {
	logTarget.Store(log)
	quietOnce.Do(func() {
		logrus.SetOutput(io.Discard)
		logrus.SetLevel(logrus.InfoLevel)
		logrus.AddHook(slogHook{})
		for _, n := range []any{distmetrics.StorageNamespace, distmetrics.NotificationsNamespace, distmetrics.ProxyNamespace} {
			if c, ok := n.(prometheus.Collector); ok {
				prometheus.DefaultRegisterer.Unregister(c)
			}
		}
	})
}

type slogHook struct{}

func (slogHook) Levels() []logrus.Level { return logrus.AllLevels }

// Fire passes an entry on. Completed requests, and errors that are the
// client's ("blob unknown"), are of interest only when debugging.
func (slogHook) Fire(e *logrus.Entry) error {
	level := slog.LevelDebug
	switch e.Level {
	case logrus.PanicLevel, logrus.FatalLevel, logrus.ErrorLevel:
		level = slog.LevelError
	case logrus.WarnLevel:
		level = slog.LevelWarn
	}
	if code, ok := e.Data["err.code"]; ok && toString(code) != "unknown" {
		level = slog.LevelDebug
	}
	log := logTarget.Load()
	ctx := e.Context
	if ctx == nil {
		ctx = context.Background()
	}
	if !log.Enabled(ctx, level) {
		return nil
	}
	var attrs []slog.Attr
	for _, k := range []string{"err.code", "err.message", "err.detail", "http.request.method", "http.request.uri", "http.response.status"} {
		if v, ok := e.Data[k]; ok {
			attrs = append(attrs, slog.Any(k, v))
		}
	}
	log.LogAttrs(ctx, level, e.Message, attrs...)
	return nil
}

func toString(v any) string {
	switch v := v.(type) {
	case string:
		return v
	case error:
		return v.Error()
	default:
		return ""
	}
}
