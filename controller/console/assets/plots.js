// Plots of a device's samples, which its stream brings as rows of numbers. They
// share one cursor; the newest rows are in the table below them too.
(function () {
  'use strict';
  var plots = document.getElementById('plots');
  var from = document.getElementById('samples');
  if (!plots || !from || !window.uPlot) return;

  var keep = 3600 + 240;
  var shown = 30; // rows of the table
  var columns = [
    { name: 'Processor', unit: '%', plot: 'Utilisation' },
    { name: 'GPU', unit: '%', plot: 'Utilisation' },
    { name: 'Memory', unit: '%', plot: 'Memory' },
    { name: 'GPU memory', unit: '%', plot: 'Memory' },
    { name: 'Power', unit: 'W', plot: 'Power' },
    { name: 'Hottest', unit: '°C', plot: 'Temperature' },
    { name: 'Slowest 1 %', unit: 'ms', plot: 'Latency' }
  ];
  var data = [[]].concat(columns.map(function () { return []; }));
  var charts = [];

  function colour(of) { return getComputedStyle(document.querySelector(of)).color; }
  var soft = colour('.plots .soft');
  var strokes = [colour('main a'), colour('body')];

  // A minute at least: one sample is a point at its end.
  function span(u, low, high) { return low === null ? [null, null] : [Math.min(low, high - 60), high]; }

  function clock(s) { return new Date(s * 1000).toLocaleTimeString(); }
  function text(v, unit) { return v === null || v === undefined ? 'not known' : (Math.round(v * 10) / 10) + ' ' + unit; }

  function make() {
    var names = [];
    columns.forEach(function (c, i) {
      if (data[i + 1].some(function (v) { return v !== null; }) && names.indexOf(c.plot) < 0) names.push(c.plot);
    });
    if (names.join() === charts.map(function (c) { return c.name; }).join()) return;
    charts.forEach(function (c) { c.u.destroy(); });
    plots.replaceChildren();
    // All boxes first: how wide one is depends on how many there are.
    var boxes = names.map(function (name) {
      var box = document.createElement('div');
      var title = document.createElement('h3');
      title.textContent = name;
      box.append(title);
      plots.append(box);
      return box;
    });
    charts = names.map(function (name, at) {
      var box = boxes[at];
      var of = [];
      columns.forEach(function (c, i) { if (c.plot === name && data[i + 1].some(function (v) { return v !== null; })) of.push(i); });
      var u = new uPlot({
        width: Math.max(box.clientWidth, 240), height: 150, cursor: { sync: { key: 'device' } },
        scales: { x: { time: true, range: span } },
        series: [{ label: 'Time', value: function (_, v) { return v === null ? '' : clock(v); } }].concat(of.map(function (i, k) {
          return { label: columns[i].name, stroke: strokes[k % 2], dash: k ? [5, 4] : undefined, width: 1.5, spanGaps: true, value: function (_, v, __, at) { return at === null ? '' : text(v, columns[i].unit); } };
        })),
        axes: [{ stroke: soft, grid: { show: false } }, { stroke: soft, size: 46, grid: { stroke: 'rgba(128,128,128,.18)', width: 1 } }]
      }, pick(of), box);
      u.root.setAttribute('aria-hidden', 'true'); // the table says the same
      return { name: name, u: u, of: of };
    });
  }

  function pick(of) { return [data[0]].concat(of.map(function (i) { return data[i + 1]; })); }

  function table() {
    var t = document.getElementById('samples-table');
    if (!t.tHead.rows.length) {
      var head = t.tHead.insertRow();
      ['Time'].concat(columns.map(function (c) { return c.name; })).forEach(function (n) {
        var th = document.createElement('th');
        th.scope = 'col';
        th.textContent = n;
        head.append(th);
      });
    }
    if (!t.closest('details').open) return;
    var body = document.createElement('tbody');
    for (var i = data[0].length - 1; i >= Math.max(0, data[0].length - shown); i--) {
      var row = body.insertRow();
      row.insertCell().textContent = clock(data[0][i]);
      columns.forEach(function (c, k) { row.insertCell().textContent = text(data[k + 1][i], c.unit); });
    }
    t.tBodies[0].replaceWith(body);
  }
  document.getElementById('samples-table').closest('details').addEventListener('toggle', table);

  document.body.addEventListener('htmx:sseMessage', function (e) {
    if (e.detail.type !== 'samples') return;
    JSON.parse(e.detail.data).forEach(function (row) {
      if (data[0].length && row[0] <= data[0][data[0].length - 1]) return;
      row.forEach(function (v, i) { data[i].push(v); });
    });
    if (data[0].length > keep) data.forEach(function (d) { d.splice(0, d.length - keep); });
    make();
    charts.forEach(function (c) { c.u.setData(pick(c.of)); });
    table();
  });
  window.addEventListener('resize', function () {
    charts.forEach(function (c) { c.u.setSize({ width: Math.max(c.u.root.parentNode.clientWidth, 240), height: 150 }); });
  });
})();
