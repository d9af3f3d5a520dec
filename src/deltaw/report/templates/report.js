(function () {
  "use strict";
  var root = document.documentElement, button = document.getElementById("theme");
  function stored(value) {
    try {
      if (value) localStorage.setItem("deltaw-theme", value);
      return localStorage.getItem("deltaw-theme");
    } catch (e) { return null; }
  }
  function dark() {
    var own = root.getAttribute("data-theme");
    return own ? own === "dark" : matchMedia("(prefers-color-scheme: dark)").matches;
  }
  function label() { button.textContent = dark() ? "Light theme" : "Dark theme"; }
  if (!root.hasAttribute("data-theme") && /^(dark|light)$/.test(stored() || "")) root.setAttribute("data-theme", stored());
  button.hidden = false;
  button.addEventListener("click", function () {
    var next = dark() ? "light" : "dark";
    root.setAttribute("data-theme", next);
    stored(next);
    label();
  });
  label();

  function key(row, column, numeric) {
    var cell = row.cells[column], s = cell.getAttribute("data-s");
    if (s === null) return null;
    return numeric ? parseFloat(s) : s.toLowerCase();
  }
  document.querySelectorAll("table").forEach(function (table) {
    var heads = Array.prototype.slice.call(table.tHead.rows[0].cells), body = table.tBodies[0];
    heads.forEach(function (head, column) {
      var numeric = head.getAttribute("data-sort") === "number", b = document.createElement("button");
      b.type = "button";
      b.title = "Sort by " + head.firstElementChild.textContent;
      b.appendChild(head.firstElementChild);
      head.insertBefore(b, head.firstChild);
      b.addEventListener("click", function () {
        var down = head.getAttribute("aria-sort") ? head.getAttribute("aria-sort") === "ascending" : numeric;
        heads.forEach(function (h) { h.removeAttribute("aria-sort"); });
        head.setAttribute("aria-sort", down ? "descending" : "ascending");
        Array.prototype.slice.call(body.rows).sort(function (x, y) {
          var a = key(x, column, numeric), c = key(y, column, numeric);
          if (a === null || c === null) return (a === null) - (c === null);
          return (a < c ? -1 : a > c ? 1 : 0) * (down ? -1 : 1);
        }).forEach(function (row) { body.appendChild(row); });
      });
    });
  });
  document.querySelectorAll("input[data-filter]").forEach(function (input) {
    var table = document.getElementById(input.getAttribute("aria-controls"));
    input.addEventListener("input", function () {
      var words = input.value.toLowerCase().split(/\s+/).filter(Boolean);
      Array.prototype.forEach.call(table.tBodies[0].rows, function (row) {
        var text = row.textContent.toLowerCase();
        row.hidden = !words.every(function (w) { return text.indexOf(w) >= 0; });
      });
    });
  });
})();
