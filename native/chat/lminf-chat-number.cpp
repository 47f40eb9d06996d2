// Numbers between two bounds, as grammars: decimal notation, without an exponent.
//
// Bounds are put on a grid of so many digits after the point, rounded inwards. Of what is on the grid a digit after the
// other is chosen, as long as there is something to choose. The texts are compared with the bounds as decimals; whoever
// reads them as doubles finds them within the bounds, too, as rounding keeps the order, and as decimals of 15 digits that
// differ are doubles that differ.

#include "lminf-chat-schema.h"
#include "lminf-chat-work.h"

#include "json-schema.h"

#include <algorithm>
#include <cmath>
#include <functional>
#include <limits>
#include <locale>
#include <sstream>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

static constexpr size_t N_DIGITS     = 16; // before the point and behind it, as of llama.cpp's numbers without bounds
static constexpr size_t MAX_DIGITS   = 40; // if bounds ask for more
static constexpr size_t EXACT_DIGITS = 15; // of decimals that doubles tell apart

namespace {

struct decimal {
    bool        is_negative = false;
    std::string whole;    // the digits before the point, "" of a number less than 1
    std::string fraction; // those behind it, without zeros at the end

    bool is_zero() const { return whole.empty() && fraction.empty(); }
};

struct bound {
    decimal value;
    bool    is_open;
};

// A number with a fixed number of digits after the point, and at least one before it.
struct grid_number {
    bool        is_negative;
    std::string digits;
};

struct bounded_number : common_chat_schema_number {
    std::string rule;
};

} // namespace

static bool all(const std::string & digits, char digit) {
    return digits.find_first_not_of(digit) == std::string::npos;
}

// --- bounds -----------------------------------------------------------------------------------------------------------

// "-12.50e-1" and the like
static decimal parse(const std::string & text) {
    decimal made;
    made.is_negative = text[0] == '-';
    std::string digits;
    size_t at    = made.is_negative;
    int    point = -1;
    for (; at < text.size() && text[at] != 'e'; ++at) {
        if (text[at] == '.') {
            point = static_cast<int>(digits.size());
        } else {
            digits += text[at];
        }
    }
    point = (point < 0 ? static_cast<int>(digits.size()) : point) + (at < text.size() ? std::stoi(text.substr(at + 1)) : 0);
    if (point < 0) {
        digits = std::string(-point, '0') + digits;
        point  = 0;
    }
    digits.resize(std::max<size_t>(digits.size(), point), '0');

    made.whole    = digits.substr(0, point);
    made.fraction = digits.substr(point);
    made.whole.erase(0, std::min(made.whole.find_first_not_of('0'), made.whole.size()));
    made.fraction.erase(made.fraction.find_last_not_of('0') + 1);
    made.is_negative = made.is_negative && !made.is_zero(); // -0 is 0
    return made;
}

static std::string written(double value, int n_digits, bool is_fixed) {
    std::ostringstream text;
    text.imbue(std::locale::classic());
    text.precision(n_digits);
    text << (is_fixed ? std::fixed : std::defaultfloat) << value;
    return text.str();
}

// The shortest decimal that is read as this double.
static decimal shortest(double value) {
    for (int n_digits = EXACT_DIGITS;; ++n_digits) {
        const std::string text = written(value, n_digits, false);
        std::istringstream reader(text);
        reader.imbue(std::locale::classic());
        double read = 0.0;
        if (n_digits == std::numeric_limits<double>::max_digits10 || ((reader >> read) && read == value)) {
            return parse(text);
        }
    }
}

// Appends what a keyword says, if it is there and says something.
static void read_bound(const common_json & schema, const std::string & key, bool is_open, bool is_lower, std::vector<bound> & bounds) {
    if (!schema.contains(key)) {
        return;
    }
    const common_json & value = schema.at(key);
    if (!value.is_number()) {
        throw std::runtime_error(key + " is a number");
    }
    const bound made = { value.is_number_integer() ? parse(value.dump()) : shortest(value.get<double>()), is_open };
    if (made.value.whole.size() > MAX_DIGITS) {
        if (made.value.is_negative != is_lower) {
            throw std::runtime_error(key + " leaves only numbers of more than " + std::to_string(MAX_DIGITS) + " digits");
        }
        return; // no answer has so many
    }
    if (made.value.whole.size() <= EXACT_DIGITS) {
        bounds.push_back(made);
        return;
    }
    double limit = value.get<double>();
    if (is_open) {
        limit = std::nextafter(limit, is_lower ? INFINITY : -INFINITY);
    }
    // integers are compared with both, the double as it is and as it is written
    bounds.push_back({ parse(written(limit, 3, true)), false });
    bounds.push_back({ is_open || !value.is_number_integer() ? shortest(limit) : made.value, false });
}

// The digits behind the point of multiples.
static size_t multiples_digits(const common_json & value) {
    const decimal unit = value.is_number_integer() ? parse(value.dump()) : value.is_number() ? shortest(value.get<double>()) : decimal();
    if (!unit.is_negative && unit.whole == "1" && unit.fraction.empty()) {
        return 0;
    }
    const size_t n_digits = unit.fraction.size();
    if (!unit.is_negative && unit.whole.empty() && n_digits > 0 && n_digits < EXACT_DIGITS &&
            unit.fraction == std::string(n_digits - 1, '0') + "1") {
        return n_digits;
    }
    throw std::runtime_error("of multipleOf, only 1, 0.1, 0.01 and so on can be enforced");
}

// --- the grid ---------------------------------------------------------------------------------------------------------

static void step(std::string & digits, bool is_up) {
    size_t i = digits.size();
    const char last = is_up ? '9' : '0';
    while (i > 0 && digits[i - 1] == last) {
        digits[--i] = is_up ? '0' : '9';
    }
    if (i == 0) {
        digits.insert(0, 1, '1'); // only of what is counted up
    } else {
        digits[i - 1] += is_up ? 1 : -1;
    }
}

// The least number of the grid that is within a lower bound.
static grid_number least_within(const bound & lower, size_t n_behind) {
    const decimal & value = lower.value;
    grid_number made = { value.is_negative, (value.whole.empty() ? "0" : value.whole) + value.fraction.substr(0, n_behind) };
    made.digits.append(std::max(value.whole.size(), size_t(1)) + n_behind - made.digits.size(), '0');
    const bool is_on_grid = value.fraction.size() <= n_behind;
    if (is_on_grid ? lower.is_open : !value.is_negative) {
        step(made.digits, !value.is_negative);
    }
    const size_t n_zeros = std::min(made.digits.find_first_not_of('0'), made.digits.size() - n_behind - 1);
    made.digits.erase(0, n_zeros);
    made.is_negative = made.is_negative && !all(made.digits, '0');
    return made;
}

static grid_number greatest_within(bound upper, size_t n_behind) {
    upper.value.is_negative = !upper.value.is_negative && !upper.value.is_zero();
    grid_number made = least_within(upper, n_behind);
    made.is_negative = !made.is_negative && !all(made.digits, '0');
    return made;
}

static bool is_less(const grid_number & a, const grid_number & b) {
    if (a.is_negative != b.is_negative) {
        return a.is_negative;
    }
    const auto & [low, high] = a.is_negative ? std::tie(b.digits, a.digits) : std::tie(a.digits, b.digits);
    return low.size() != high.size() ? low.size() < high.size() : low < high;
}

// --- rules ------------------------------------------------------------------------------------------------------------

static std::string one_of(char from, char to) {
    return from == to ? std::string("\"") + from + "\"" : std::string("[") + from + "-" + to + "]";
}

static std::string repeated(const std::string & digit, size_t least, size_t most) {
    return digit + "{" + std::to_string(least) + (least < most ? "," + std::to_string(most) : "") + "}";
}

static std::string digits_between(const std::string & from, const std::string & to, size_t n_before);

// What follows a digit.
static std::string rest_between(const std::string & from, const std::string & to, size_t n_before, bool is_behind_point) {
    if (from.empty()) {
        return "";
    }
    if (n_before > 0) {
        return all(from, '0') && all(to, '9') ?
            " " + repeated("[0-9]", n_before, n_before) + rest_between(from.substr(n_before), to.substr(n_before), 0, false) :
            " (" + digits_between(from, to, n_before) + ")";
    }
    std::string digits = is_behind_point ? "" : "\".\" ";
    if (all(to, '0')) {
        digits += repeated("\"0\"", 1, to.size());
    } else if (all(from, '0') && all(to, '9')) {
        digits += repeated("[0-9]", 1, to.size());
    } else {
        digits += "(" + digits_between(from, to, 0) + ")";
    }
    return all(from, '0') ? " (" + digits + ")?" : " " + digits; // what is not written is 0
}

// The numbers between two that have equally many digits, so many of them before the point.
static std::string digits_between(const std::string & from, const std::string & to, size_t n_before) {
    lminf_chat_charge(256 + 16 * from.size());
    const std::string from_rest = from.substr(1), to_rest = to.substr(1);
    const std::string zeros(from_rest.size(), '0'), nines(from_rest.size(), '9');
    const auto with = [&](char low, char high, const std::string & least, const std::string & most) {
        return one_of(low, high) + rest_between(least, most, n_before > 0 ? n_before - 1 : 0, n_before == 0);
    };
    if (from[0] == to[0]) {
        return with(from[0], from[0], from_rest, to_rest);
    }
    const char low  = from[0] + !all(from_rest, '0');
    const char high = to[0] - !all(to_rest, '9');
    std::string rule = low > from[0] ? with(from[0], from[0], from_rest, nines) : "";
    if (low <= high) {
        rule += (rule.empty() ? "" : " | ") + with(low, high, zeros, nines);
    }
    if (high < to[0]) {
        rule += (rule.empty() ? "" : " | ") + with(to[0], to[0], zeros, to_rest);
    }
    return rule;
}

// The numbers between two that are not negative.
static std::string magnitudes_between(const std::string & from, const std::string & to, size_t n_behind) {
    std::string rule;
    for (size_t n = from.size(), last; n <= to.size(); n = last + 1) {
        const bool is_first = n == from.size() && from != "1" + std::string(n - 1, '0');
        last = is_first ? n : to.size() - !all(to, '9'); // up to these, any with as many digits
        rule += rule.empty() ? "" : " | ";
        if (is_first || last < n) {
            last = n;
            const std::string least = is_first ? from : "1" + std::string(n - 1, '0');
            rule += digits_between(least, n == to.size() ? to : std::string(n, '9'), n - n_behind);
        } else {
            rule += "[1-9]" + (last > n_behind + 1 ? " " + repeated("[0-9]", n - n_behind - 1, last - n_behind - 1) : "") +
                rest_between(std::string(n_behind, '0'), std::string(n_behind, '9'), 0, false);
        }
    }
    return rule;
}

static std::string number_rule(const common_json & schema) {
    std::vector<bound> lower, upper;
    for (const bool is_open : { false, true }) {
        read_bound(schema, is_open ? "exclusiveMinimum" : "minimum", is_open, true, lower);
        read_bound(schema, is_open ? "exclusiveMaximum" : "maximum", is_open, false, upper);
    }
    size_t n_whole  = 0; // of the bounds
    size_t n_behind = N_DIGITS;
    size_t n_exact  = MAX_DIGITS;
    for (const auto * bounds : { &lower, &upper }) {
        for (const auto & [value, is_open] : *bounds) {
            n_whole  = std::max(n_whole, value.whole.size());
            n_behind = std::max(n_behind, value.fraction.size() + 1);
            if (is_open && !value.is_zero()) {
                const size_t n_zeros = value.whole.empty() ? value.fraction.find_first_not_of('0') : 0;
                n_exact = std::min(n_exact, EXACT_DIGITS + n_zeros - value.whole.size());
            }
        }
    }
    n_behind = std::min(n_behind, n_exact);
    size_t n_before = std::max(N_DIGITS, n_whole + 1);
    if (schema.contains("multipleOf")) {
        n_behind = multiples_digits(schema.at("multipleOf"));
        n_before = EXACT_DIGITS - n_behind;
        if (n_whole > n_before) {
            throw std::runtime_error("multipleOf cannot be enforced beside such bounds");
        }
    }
    const std::string most(n_before + n_behind, '9');
    grid_number least = { true, most }, greatest = { false, most };
    for (const auto & each : lower) {
        least = std::max(least, least_within(each, n_behind), is_less);
    }
    for (const auto & each : upper) {
        greatest = std::min(greatest, greatest_within(each, n_behind), is_less);
    }
    if (is_less(greatest, least)) {
        throw std::runtime_error("no number of " + std::to_string(n_behind) + " digits after the point is within the bounds");
    }
    const std::string zero(n_behind + 1, '0');
    std::string rule;
    if (!greatest.is_negative) {
        rule = magnitudes_between(least.is_negative ? zero : least.digits, greatest.digits, n_behind);
    }
    if (least.is_negative) {
        rule += (rule.empty() ? "" : " | ") + std::string("\"-\" (") +
            magnitudes_between(greatest.is_negative ? greatest.digits : zero, least.digits, n_behind) + ")";
    }
    return rule;
}

std::unique_ptr<common_chat_schema> lminf_chat_number(const common_json & schema) {
    auto made = std::make_unique<bounded_number>();
    for (const char * key : { "minimum", "exclusiveMinimum", "maximum", "exclusiveMaximum", "multipleOf" }) {
        if (schema.contains(key)) {
            made->rule = number_rule(schema);
            break;
        }
    }
    return made;
}

const std::string & lminf_chat_number_rule(const common_chat_schema & number) {
    return static_cast<const bounded_number &>(number).rule;
}

std::string lminf_chat_number_name(const common_chat_schema & number) {
    return "number-" + std::to_string(std::hash<std::string>()(lminf_chat_number_rule(number)));
}
